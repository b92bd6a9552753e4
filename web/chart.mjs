/**
 * Bars as SVG: one column a row, an axis beside them that stays while they scroll, and both in one
 * picture for saving.
 *
 * Colors are variables with the values of the page's theme; `picture` writes those out, since a
 * saved picture has no page around it. The palette has at least 3:1 contrast on #f5f5f5 and on #222.
 */

import { group, groups, range, sentence, value } from "./document.mjs";

const SVG = "http://www.w3.org/2000/svg";
export const AXIS = 64; // px
const TOP = 10; // px above the highest bar, for half a line of text
const BOTTOM = 6;
const STUB = 5; // px, the height of a row that has no value
const PALETTE = ["#3b8eea", "#14967f", "#9a6dd7", "#c0681a", "#b8568f"];
const GREY = "#8a8a8a";

export const STYLE = `
  text { font: 11px system-ui, sans-serif; fill: var(--mx-text); }
  .line { stroke: var(--mx-line); stroke-width: 1; }
  .threshold { stroke: var(--mx-bad); stroke-width: 1.5; stroke-dasharray: 5 3; }
  .threshold-label { font-weight: bold; }
  .before { fill: none; stroke: var(--mx-soft); }
  .below { stroke: var(--mx-text); stroke-width: 1.5; }
  .chosen { fill: var(--mx-text); fill-opacity: 0.15; }
`;

/** An SVG element. */
function element(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, v] of Object.entries(attributes)) made.setAttribute(key, v);
  made.append(...children);
  return made;
}

/** Group -> color, the same for every order and filter of the rows. */
export function colors(rows) {
  let next = 0;
  return new Map(
    groups(rows).map(([name]) => [name, name === "kept" ? GREY : PALETTE[next++ % PALETTE.length]]),
  );
}

/** How a measure becomes pixels. */
export function scale(rows, measure, data, height) {
  const { low, high, threshold } = range(rows, measure, data);
  const y = (v) => TOP + ((high - v) / (high - low)) * (height - TOP - BOTTOM);
  return { low, high, threshold, height, y };
}

/** A number without the zeros that end its decimals: "32.00 dB" as "32 dB". */
function short(text) {
  return text.replace(/\.(\d*?)0+(?=\D|$)/, (_, digits) => (digits ? `.${digits}` : ""));
}

/** The axis: its ends, its middle and the threshold. */
export function axis(measure, { low, high, threshold, height, y }) {
  const svg = element("svg", { width: AXIS, height, "aria-hidden": "true" });
  const label = (v, extra = "") => element(
    "text",
    { x: AXIS - 6, y: y(v) + 4, "text-anchor": "end", class: extra },
    document.createTextNode(short(measure.format(v))),
  );
  const far = (v) => threshold === undefined || Math.abs(y(v) - y(threshold)) > 13;
  svg.append(...[low, (low + high) / 2, high].filter(far).map((v) => label(v)));
  if (threshold !== undefined) svg.append(label(threshold, "threshold-label"));
  return svg;
}

/**
 * The bars: a list of options of which one can be chosen.
 *
 * @param {object[]} rows in the order to draw them
 * @param {Map<string, string>} palette from `colors`
 * @param {number} width in px; grows where bars would become thinner than 3 px
 */
export function bars(rows, measure, at, palette, width) {
  const step = Math.min(90, Math.max(3, width / Math.max(rows.length, 1)));
  const thick = step - Math.min(4, step * 0.25);
  const full = Math.max(width, Math.ceil(step * rows.length));
  const svg = element("svg", {
    width: full, height: at.height, role: "listbox", tabindex: 0,
    "aria-label": `${measure.label}, ${rows.length} bars`,
  });
  svg.dataset.step = step;
  for (const v of [at.low, (at.low + at.high) / 2, at.high]) {
    svg.append(element("line", { class: "line", x1: 0, x2: full, y1: at.y(v), y2: at.y(v) }));
  }
  svg.append(element("rect", { class: "chosen", y: 0, width: step, height: at.height, x: -step }));
  rows.forEach((row, index) => {
    const x = index * step + (step - thick) / 2;
    const before = row[measure.before];
    if (typeof before === "number") {
      svg.append(element("rect", {
        class: "before", x, y: at.y(before), width: thick, height: at.y(at.low) - at.y(before),
      }));
    }
    svg.append(bar(row, measure, at, palette, x, thick, index));
  });
  if (at.threshold !== undefined) {
    const y = at.y(at.threshold);
    svg.append(element("line", { class: "threshold", x1: 0, x2: full, y1: y, y2: y }));
  }
  return svg;
}

function bar(row, measure, at, palette, x, thick, index) {
  const v = value(row, measure);
  const height = isNaN(v) ? STUB : Math.max(at.y(at.low) - at.y(v), 1);
  const below = at.threshold !== undefined && v < at.threshold;
  return element("rect", {
    id: `bar-${index}`, role: "option", "aria-selected": "false",
    "aria-label": sentence(row, measure, at.threshold),
    class: below ? "bar below" : "bar",
    x, width: thick, y: at.y(at.low) - height, height,
    fill: isNaN(v) ? GREY : palette.get(group(row)) ?? PALETTE[0],
  });
}

/** Words in lines of at most so many characters; a line break stays one. */
export function wrap(text, most) {
  return text.split("\n").flatMap((line) => {
    const lines = [""];
    for (const word of line.split(" ")) {
      const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
      if (longer.length > most && lines.at(-1)) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    return lines;
  });
}

/** Title, colors, axis and bars in one SVG text, its theme's colors written out. */
export function picture(title, { axis, bars, palette }, theme) {
  const width = Math.max(AXIS + Number(bars.getAttribute("width")) + 8, 480);
  const lines = wrap(title, Math.floor((width - 16) / 6.5)); // px of a character, roughly
  const head = 18 * (lines.length + 1) + 8;
  const height = head + Number(bars.getAttribute("height"));
  const svg = element("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}` });
  const variables = Object.entries(theme).map(([name, v]) => `${name}: ${v};`).join(" ");
  const text = (content, x, y) => element("text", { x, y }, document.createTextNode(content));
  svg.append(
    element("style", {}, document.createTextNode(`svg { ${variables} } ${STYLE}`)),
    element("rect", { width, height, fill: theme["--mx-back"] }),
    ...lines.map((line, i) => text(line, 8, 18 * (i + 1))),
  );
  let x = 8;
  for (const [name, color] of palette) {
    const y = 18 * (lines.length + 1);
    svg.append(element("rect", { x, y: y - 9, width: 9, height: 9, fill: color }));
    svg.append(text(name, x + 13, y));
    x += 28 + 6.5 * name.length;
  }
  for (const [part, left] of [[axis, 0], [bars, AXIS]]) {
    const copy = part.cloneNode(true);
    copy.setAttribute("x", left);
    copy.setAttribute("y", head);
    svg.append(copy);
  }
  return { text: new XMLSerializer().serializeToString(svg), width, height };
}
