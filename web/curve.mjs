/**
 * The curve of a model as SVG: size against the predicted error of the output. A point for every
 * layer that is kept beside those before it, for presets, and for what was asked for.
 *
 * It stands where a report's bars do (`report.mjs`), and is a list box as they are: each point is an
 * option. Points without any error, or whose error is not known, have no place on it.
 */

import { element } from "./chart.mjs";
import { bytes, decibels, excluding } from "./document.mjs";
import { t } from "./language.mjs";

const VERSION = 1; // of a budget
const KEY = "mxfp8_budget";
const TOP = 10; // px
const BOTTOM = 22; // px, with the sizes
const SIDE = 8; // px, so that points at the ends are whole
const COLORS = { step: "#3b8eea", other: "#c0681a", target: "#14967f" };

export const STYLE = `
  .curve { fill: none; stroke: ${COLORS.step}; stroke-width: 1.5; }
  .band { fill: ${COLORS.step}; fill-opacity: 0.15; }
  .point { stroke: var(--mx-back); stroke-width: 1; }
  .point[aria-selected=true] { stroke: var(--mx-text); stroke-width: 2; }
`;

/** The measure by which the view offers the curve. */
const MEASURE = {
  key: "snr_db", rows: "points", curve: true, higher: true, format: decibels,
  get label() { return t("Size and quality"); },
};

/**
 * A document with the curve of a budget as its first measure; the document itself may be the budget.
 *
 * @param {string} [text] JSON of the budget
 */
export function added(document, text) {
  const rows = points(text === undefined ? document.data : JSON.parse(text));
  if (rows.length < 2) return document;
  return {
    ...document, measures: [MEASURE, ...document.measures], rows: { ...document.rows, points: rows },
  };
}

/**
 * The points of a budget.
 *
 * @param {object} budget as quant/reports/budget.py writes it
 * @returns {object[]} each with name, kind ("step", "other" or "target"), bytes, snr_db, low, high,
 *     and exclude: the regular expression that makes it with the same preset and include, null if
 *     there is none
 */
function points(budget) {
  if (budget?.[KEY] !== VERSION) return [];
  const { curve, others = [], layers, chosen, exclude = [] } = budget;
  const names = layers.map(({ name }) => name);
  const joined = (...expressions) => [...exclude, ...expressions].join("|") || null;
  return [
    ...curve.map((point, index) => ({
      ...point, kind: "step",
      exclude: index ? joined(excluding(names.slice(0, index))) : joined(),
    })),
    ...others.map((point) => ({ ...point, kind: "other", exclude: null })),
    ...(chosen ? [{ ...chosen.point, kind: "target", exclude: joined(...chosen.exclude) }] : []),
  ].filter(({ snr_db }) => typeof snr_db === "number")
    .map((point) => ({ ...point, name: point.label }));
}

/** What the legend shows: kind -> color, of the kinds that occur, by their names. */
export function palette(rows) {
  const names = { step: t("one more layer kept per point"), other: t("presets"), target: t("target") };
  return new Map(
    Object.keys(names).filter((kind) => rows.some((row) => row.kind === kind))
      .map((kind) => [names[kind], COLORS[kind]]),
  );
}

/** The range of both axes, and the mapping from values to pixels. */
export function scale(rows, width, height) {
  const snr = rows.map((row) => row.snr_db);
  const sizes = rows.map((row) => row.bytes);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  const low = Math.floor(Math.min(...snr) - 0.5);
  const high = Math.ceil(Math.max(...snr) + 0.5);
  const x = (v) => SIDE + ((v - least) / (most - least || 1)) * (width - 2 * SIDE);
  const y = (v) => TOP + ((high - v) / (high - low)) * (height - TOP - BOTTOM);
  return { least, most, low, high, width, height, x, y };
}

/** The curve, its band of one standard error, and its points. */
export function draw(rows, at) {
  const { width, height, x, y, low, high } = at;
  const svg = element("svg", {
    width, height, role: "listbox", tabindex: 0,
    "aria-label": `${MEASURE.label}, ${t("[count] points", { count: rows.length })}`,
  });
  for (const v of [low, (low + high) / 2, high]) {
    svg.append(element("line", { class: "line", x1: 0, x2: width, y1: y(v), y2: y(v) }));
  }
  const steps = rows.filter(({ kind }) => kind === "step");
  const path = (list, key) => list.map((row) => `${x(row.bytes)},${y(row[key])}`);
  const inside = (v) => Math.min(Math.max(v, low), high);
  const banded = steps.filter((row) => typeof row.low === "number")
    .map((row) => ({ ...row, low: inside(row.low), high: inside(row.high) }));
  svg.append(
    element("polygon", {
      class: "band", points: [...path(banded, "high"), ...path(banded, "low").reverse()].join(" "),
    }),
    element("polyline", { class: "curve", points: path(steps, "snr_db").join(" ") }),
  );
  const ends = [[at.least, "start"], [(at.least + at.most) / 2, "middle"], [at.most, "end"]];
  for (const [size, anchor] of ends) {
    svg.append(element(
      "text", { x: x(size), y: height - 4, "text-anchor": anchor },
      document.createTextNode(bytes(Math.round(size))),
    ));
  }
  rows.forEach((row, index) => {
    svg.append(element("circle", {
      id: `bar-${index}`, class: "bar point", role: "option", "aria-selected": "false",
      "aria-label": sentence(row), cx: x(row.bytes), cy: y(row.snr_db),
      r: row.kind === "step" ? 3 : 5.5, fill: COLORS[row.kind],
    }));
  });
  return svg;
}

/** The index of the point that is nearest to a place in the drawing, in px. */
export function nearest(rows, at, left, top) {
  const distance = (row) => Math.hypot(at.x(row.bytes) - left, at.y(row.snr_db) - top)
    - (row.kind === "step" ? 0 : 4); // these cover steps
  return rows.reduce((best, row, index) => (distance(row) < distance(rows[best]) ? index : best), 0);
}

/** The point to begin with: the target, else all in MXFP8. */
export function initial(rows) {
  return Math.max(rows.findIndex(({ kind }) => kind === "target"), 0);
}

/** Everything known about a point: label and text. */
export function describe(row) {
  return [
    [t("Size"), bytes(row.bytes)],
    [t("Predicted latent SNR"), decibels(row.snr_db) + (typeof row.low === "number"
      ? ` (${row.low.toFixed(1)}${t(" to ")}${row.high.toFixed(1)})` : "")],
    [t("Layers kept"), String(row.kept)],
  ];
}

function sentence(row) {
  return [row.name, bytes(row.bytes), decibels(row.snr_db)].join(", ");
}

