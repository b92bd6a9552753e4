/**
 * The report view's texts in the language of ComfyUI's page.
 *
 * A text is known by its English, which stands in the code and is shown where there is no translation
 * (as in gettext; names of keys would hide what the code says). Translations are in
 * `locales/LANGUAGE/main.json` under "mxfp8"; `make locales` finds the English ones by their calls, so
 * `t` is called with the text itself. This knows nothing of ComfyUI: `mxfp8.js` gives it what the
 * server sends.
 *
 * Verdicts come from the server in parts, with their values apart. Reasons and plans come as English
 * lines, since files and logs have them so; `translated` recognizes a line by the words around its values.
 */

const NONE = {};
let translations = () => NONE;
const recognizers = new WeakMap(); // translations of a language -> what `translated` makes of them
const LONGEST = 400; // characters of a line that is looked at: matching takes the cube of them
const MOST_KNOWN = 2000; // lines and values whose translations are kept

// What values look like in a line of the server, by their names: the words around them alone would
// make other sentences ours. A value of any other name is a NAME.
const NUMBER = "-?\\d+(?:\\.\\d+)?";
const SIZE = `${NUMBER} (?:B|kB|MB|GB)`;
const QUOTED = `'(?:[^'\\\\]|\\\\.)*'|"(?:[^"\\\\]|\\\\.)*"`;
const NAME = "(?:(?!; ).)+?";
const PHRASE = `${QUOTED}|${NAME}`;
const VALUES = {
  count: "\\d+", first: "\\d+", last: "\\d+", measured: "\\d+", others: "\\d+", steps: "\\d+",
  low: NUMBER, percent: NUMBER, ratio: NUMBER, sqnr: NUMBER, worst: NUMBER,
  after: SIZE, before: SIZE, saved: SIZE, size: SIZE, speed: SIZE,
  time: "\\d[\\w. ]*", option: "\\w+", preset: "[\\w.-]+", dtype: "\\w+",
  expression: QUOTED, layers: PHRASE, warning: ".+",
};
// Values that are numbers, quoted, or texts themselves; and names in whose place there may be a text.
const PHRASES = ["data", "layers", "rows", "seeds", "what", "who", "word"];
const OPEN = ["architecture", "warning"];
const PLAIN = new RegExp(`^(?:\\d+|${QUOTED})$`);

/** Set what returns the translations for the page, English text -> text, or undefined. */
export function translateWith(table) {
  translations = () => table() ?? NONE;
}

function find(english) {
  const texts = translations();
  return Object.hasOwn(texts, english) ? texts[english] : english;
}

function filled(text, values) {
  return text.replace(/\[(\w+)\]/g, (whole, name) => values[name] ?? whole);
}

/**
 * @param {string} english
 * @param {object} values of the names in brackets, as in "[count] bars": numbers, texts, which are
 *     translated too if they can be, and {text, values} of such a text
 */
export function t(english, values = {}) {
  const said = (value) => (value?.text === undefined ? find(value) : t(value.text, value.values));
  const all = Object.entries(values).map(([name, value]) => [name, said(value)]);
  return filled(find(english), Object.fromEntries(all));
}

/** Lines of the server in the language of the page; what is not among the texts stays as it is. */
export function translated(lines) {
  const language = recognizer(translations());
  return lines.split("\n").map((line) => {
    if (line.length > LONGEST) return line;
    const whole = recognized(line, language);
    if (whole !== undefined) return whole;
    const parts = line.split("; ").map((part) => recognized(part, language));
    return parts.includes(undefined) ? line : parts.join(t("; "));
  }).join("\n");
}

/** A line or a part of it, undefined if it is not one of the texts as a whole. */
function recognized(line, language) {
  const { known, patterns } = language;
  if (!known.has(line)) {
    if (known.size >= MOST_KNOWN) known.clear();
    known.set(line, search(line, patterns, language));
  }
  return known.get(line);
}

function search(line, patterns, language) {
  for (const { english, names, pattern } of patterns) {
    const found = pattern.exec(line)?.slice(1);
    if (!found) continue;
    const values = found.map((value, i) => valueOf(names[i], value, language));
    if (values.includes(undefined)) continue;
    return filled(find(english), Object.fromEntries(names.map((name, i) => [name, values[i]])));
  }
}

/** A value in the language of the page, undefined if it is none that goes by this name. */
function valueOf(name, value, language) {
  if (PHRASES.includes(name)) {
    return PLAIN.test(value) ? value : recognized(value, language);
  }
  return OPEN.includes(name) ? recognized(value, language) ?? value : value;
}

/** The patterns of a language's texts that have words of their own, those with the most first. */
function recognizer(texts) {
  if (!recognizers.has(texts)) {
    const patterns = Object.keys(texts).map((english) => {
      const [first, ...rest] = english.split(/\[(\w+)\]/); // words, name, words, name, ...
      const names = rest.filter((_, i) => i % 2 === 0);
      const words = [first, ...rest.filter((_, i) => i % 2)];
      const escaped = words.map((part) => part.replace(/[^\w\s]/g, "\\$&"));
      const pattern = escaped.reduce((all, part, i) => `${all}(${VALUES[names[i - 1]] ?? NAME})${part}`);
      return { english, names, words: words.join(""), pattern: new RegExp(`^${pattern}$`) };
    }).filter(({ words }) => /\w{2}/.test(words)).sort((a, b) => b.words.length - a.words.length);
    recognizers.set(texts, { known: new Map(), patterns });
  }
  return recognizers.get(texts);
}
