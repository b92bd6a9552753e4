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

/** Set what returns the translations for the page, English text -> text, or undefined. */
export function translateWith(table) {
  translations = () => table() ?? NONE;
}

function find(english) {
  const texts = translations();
  return Object.hasOwn(texts, english) ? texts[english] : english;
}

/**
 * @param {string} english
 * @param {object} values of the names in brackets, as in "[count] bars": numbers, texts, which are
 *     translated too if they can be, and {text, values} of such a text
 */
export function t(english, values = {}) {
  return find(english).replace(/\[(\w+)\]/g, (whole, name) => {
    const value = values[name] ?? whole;
    return typeof value === "object" ? t(value.text, value.values) : find(value);
  });
}

/** Lines of the server in the language of the page; what is not among the texts stays as it is. */
export function translated(lines) {
  const { known, patterns } = recognizer(translations());
  if (!known.has(lines)) {
    const line = (text) => recognized(text, patterns)
      ?? text.split("; ").map((part) => recognized(part, patterns) ?? part).join(t("; "));
    known.set(lines, lines.split("\n").map(line).join("\n"));
  }
  return known.get(lines);
}

function recognized(line, patterns) {
  for (const { english, names, pattern } of patterns) {
    const values = pattern.exec(line)?.slice(1);
    if (values) return t(english, Object.fromEntries(names.map((name, i) => [name, translated(values[i])])));
  }
}

/** The patterns of a language's texts that have words of their own, those with the most first. */
function recognizer(texts) {
  if (!recognizers.has(texts)) {
    const patterns = Object.keys(texts).map((english) => {
      const [first, ...rest] = english.split(/\[(\w+)\]/); // words, name, words, name, ...
      const names = rest.filter((_, i) => i % 2 === 0);
      const words = [first, ...rest.filter((_, i) => i % 2)];
      const value = (name) => (name === "count" ? "(\\d+)" : "((?:(?!; ).)+?)");
      const escaped = words.map((part) => part.replace(/[^\w\s]/g, "\\$&"));
      const pattern = escaped.reduce((all, part, i) => all + value(names[i - 1]) + part);
      return { english, names, words: words.join(""), pattern: new RegExp(`^${pattern}$`) };
    }).filter(({ words }) => /\w{2}/.test(words)).sort((a, b) => b.words.length - a.words.length);
    recognizers.set(texts, { known: new Map(), patterns });
  }
  return recognizers.get(texts);
}
