/**
 * The bar chart as SVG: one bar per row, an axis that stays in place while the bars scroll, and both
 * in one picture for saving.
 *
 * Colors are CSS variables of the page's theme; `picture` writes out their values, since a saved
 * picture has no page around it. The palette has at least 3:1 contrast on #f5f5f5 and on #222.
 */

import { group, groups, isKept, sentence, title as titleOf, value } from "./document.mjs";
import { t } from "./language.mjs";

const SVG = "http://www.w3.org/2000/svg";
export const AXIS = 64; // px
const TOP = 10; // px above the highest bar: half a line of text
const BOTTOM = 6;
const STUB = 5; // px, the height of a bar without a value
const PALETTE = ["#3b8eea", "#14967f", "#9a6dd7", "#c0681a", "#b8568f"];
const GRAY = "#8a8a8a";

export const STYLE = `
  text { font: 11px system-ui, sans-serif; fill: var(--mx-text); }
  .line { stroke: var(--mx-line); stroke-width: 1; }
  .threshold { stroke: var(--mx-bad); stroke-width: 1.5; stroke-dasharray: 5 3; }
  .threshold-label { font-weight: bold; }
  .outline { fill: none; stroke: var(--mx-soft); }
  .below { stroke: var(--mx-text); stroke-width: 1.5; }
  .chosen { fill: var(--mx-text); fill-opacity: 0.15; }
`;

/** An SVG element. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, v] of Object.entries(attributes)) node.setAttribute(key, v);
  node.append(...children);
  return node;
}

/** Group -> color, independent of the order and filter of the rows. */
export function colors(rows) {
  let next = 0;
  return new Map(
    groups(rows).map(([name]) => [name, isKept(name) ? GRAY : PALETTE[next++ % PALETTE.length]]),
  );
}

/** The range of the axis and the mapping from values to pixels. */
export function scale(rows, measure, data, height) {
  const threshold = data[measure.threshold];
  const values = rows.flatMap((row) => [row[measure.key], row[measure.outline]]).concat(threshold)
    .filter((v) => typeof v === "number" && isFinite(v));
  let low = 0;
  let high = Math.max(...values, 0);
  if (measure.floating && values.length) {
    low = Math.floor((Math.min(...values) - 1) / 2) * 2;
    high = Math.ceil(high);
  }
  if (high <= low) high = low + 1;
  const y = (v) => TOP + ((high - v) / (high - low)) * (height - TOP - BOTTOM);
  return { low, high, threshold, height, y };
}

/** A number without trailing zeros: "32.00 dB" as "32 dB". */
function short(text) {
  return text.replace(/\.(\d*?)0+(?=\D|$)/, (_, digits) => (digits ? `.${digits}` : ""));
}

/** The axis, labeled at its ends, in the middle and at the threshold. */
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
 * The bars, as a list box.
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
    "aria-label": t("[measure], [count] bars", { measure: measure.label, count: rows.length }),
  });
  svg.dataset.step = step;
  for (const v of [at.low, (at.low + at.high) / 2, at.high]) {
    svg.append(element("line", { class: "line", x1: 0, x2: full, y1: at.y(v), y2: at.y(v) }));
  }
  svg.append(element("rect", { class: "chosen", y: 0, width: step, height: at.height, x: -step }));
  rows.forEach((row, index) => {
    const x = index * step + (step - thick) / 2;
    const outline = row[measure.outline];
    if (typeof outline === "number") {
      svg.append(element("rect", {
        class: "outline", x, y: at.y(outline), width: thick, height: at.y(at.low) - at.y(outline),
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
    fill: isNaN(v) ? GRAY : palette.get(group(row)) ?? PALETTE[0],
  });
}

/** Lines of at most `limit` characters, broken between words; line breaks in the text stay. */
function wrap(text, limit) {
  return text.split("\n").flatMap((line) => {
    const lines = [""];
    for (const word of line.split(" ")) {
      const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
      if (longer.length > limit && lines.at(-1)) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    return lines;
  });
}

/** Title, legend, axis and bars as the text of one SVG, with the theme's colors written out. */
export function picture(title, { axis, bars, palette }, theme) {
  const width = Math.max(AXIS + Number(bars.getAttribute("width")) + 8, 480);
  const lines = wrap(title, Math.floor((width - 16) / 6.5)); // px per character, roughly
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
    svg.append(text(titleOf(name), x + 13, y));
    x += 28 + 6.5 * titleOf(name).length;
  }
  for (const [part, left] of [[axis, 0], [bars, AXIS]]) {
    const copy = part.cloneNode(true);
    copy.setAttribute("x", left);
    copy.setAttribute("y", head);
    svg.append(copy);
  }
  return { text: new XMLSerializer().serializeToString(svg), width, height };
}
