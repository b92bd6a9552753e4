/**
 * Reads the documents that nodes send: their rows, and the measures that can be drawn of them.
 *
 * A document is JSON with a version under one of the keys of `KINDS`. The rows of all kinds share
 * their field names (`quant/reports`), so a measure is offered wherever some row has a value for it,
 * and no kind needs code of its own. Nothing here touches the page.
 */

import { t, translated } from "./language.mjs";

// The key that holds a document's version -> what a saved picture of it is called.
const KINDS = {
  mxfp8_report: "conversion",
  mxfp8_inspection: "inspection",
  mxfp8_backend_report: "backend-report",
  mxfp8_comparison: "comparison",
  mxfp8_budget: "budget",
  mxfp8_certificate: "comparison", // as earlier versions wrote it
};
const VERSION = 1;
const KEPT = "kept"; // the decision on a layer that is not quantized

/**
 * Measures in order of preference.
 *
 * @typedef {object} Measure
 * @property {string} key the field of a row
 * @property {string} label in the page's language
 * @property {string} rows the list of the document that has it
 * @property {(value: number) => string} format
 * @property {boolean} [higher] whether higher is better
 * @property {boolean} [floating] whether its axis may start above zero (decibels have no zero)
 * @property {string} [outline] the field that is drawn as an outline, for comparison
 * @property {string} [outlineLabel]
 * @property {string} [threshold] the field of the document that is drawn as a line
 * @type {Measure[]}
 */
const MEASURES = [
  { key: "output_error", get label() { return t("Output error"); }, rows: "layers", format: relative,
    outline: "nearest_error", get outlineLabel() { return t("rounding to nearest"); } },
  { key: "sqnr_db", get label() { return t("SQNR"); }, rows: "layers", format: decibels, higher: true, floating: true,
    threshold: "min_sqnr_db" },
  { key: "microseconds", get label() { return t("Time"); }, rows: "layers", format: microseconds },
  { key: "bytes_after", get label() { return t("Size"); }, rows: "layers", format: bytes,
    outline: "bytes_before", get outlineLabel() { return t("before"); } },
  { key: "bytes", get label() { return t("Size"); }, rows: "layers", format: bytes },
  { key: "damage", get label() { return t("Share of the error"); }, rows: "layers", format: relative },
  { key: "cost", get label() { return t("Cost in size"); }, rows: "layers", format: bytes },
  { key: "divergence", get label() { return t("Divergence"); }, rows: "steps", format: relative },
  { key: "latent_snr_db", get label() { return t("Latent SNR"); }, rows: "seeds", format: decibels,
    higher: true, floating: true },
  { key: "psnr_db", get label() { return t("PSNR"); }, rows: "seeds", format: decibels, higher: true,
    floating: true },
  { key: "ssim", get label() { return t("SSIM"); }, rows: "seeds", format: ratio, higher: true },
  { key: "hit", get label() { return t("LoRAs: linear layers changed"); }, rows: "adapters",
    format: String, higher: true },
];

/** The sort orders: how they compare rows, and a measure that they are not for. */
const ORDERS = {
  "in order": { get label() { return t("in order"); } },
  "worst first": {
    get label() { return t("worst first"); },
    compare: (a, b, measure) => badness(a, measure) - badness(b, measure) || 0,
  },
  "largest first": {
    get label() { return t("largest first"); }, layersOnly: true,
    compare: (a, b) => size(b) - size(a),
  },
  "by name": {
    get label() { return t("by name"); }, layersOnly: true,
    compare: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
  },
};

/** What `read` returns where there is no document. */
export const NONE = { kind: "", measures: [], rows: {}, data: {} };

/**
 * Read a document.
 *
 * @param {string} text JSON
 * @returns {{kind: string, measures: Measure[], rows: Record<string, object[]>, data: object}}
 * @throws {Error} the kind or the version is unknown
 */
export function read(text) {
  const data = JSON.parse(text, exact);
  const key = Object.keys(KINDS).find((kind) => kind in data);
  if (key === undefined || data[key] !== VERSION) {
    throw new Error(t("this page cannot show a document of kind [kind], version [version]", {
      kind: String(key), version: String(data[key]),
    }));
  }
  const rows = {
    layers: key === "mxfp8_budget" ? data.layers.map(budgeted) : data.layers ?? [],
    steps: (data.steps ?? []).map((step) => ({ ...step, name: t("step [number]", { number: step.step }) })),
    seeds: (data.seeds ?? []).map((seed) => ({ ...seed, name: t("seed [number]", { number: seed.seed }) })),
    adapters: [
      ...adapters(data),
      ...adapters(data.reference, t("reference: ")),
      ...adapters(data.model, t("model: ")),
    ],
  };
  const measures = MEASURES.filter((m) => rows[m.rows].some((row) => isFinite(value(row, m))));
  return { kind: KINDS[key], measures, rows, data };
}

/**
 * What a document comes down to: its verdict, or what the summary says first, and its warnings.
 *
 * @returns {{level: string, text: string, said?: string, layers: string[]}} level: "good", "notice",
 *     "bad" or ""; said: the text in English, with which the summary begins
 */
export function verdict(data, summary) {
  const given = data.verdict;
  if (given) {
    const parts = given.parts?.map(({ text, values }) => t(text, values));
    return { ...given, said: given.text, text: parts?.length ? parts.join(t("; ")) : given.text };
  }
  const lines = summary.split("\n");
  const end = lines.find((line) => /^(NOT )?OK:/.test(line)); // of a check
  if (end) return { level: end.startsWith("OK") ? "good" : "bad", text: end, layers: [] };
  const warnings = lines.slice(1).filter((line) => line.startsWith("WARNING"));
  return {
    level: warnings.length ? "notice" : "", text: [lines[0], ...warnings].join("\n"), layers: [],
  };
}

/** The name of a saved picture: what it is of, and when it was made. */
export function pictureName({ kind, data }, now) {
  const named = [data.source, data.file, data.model?.model, data.model];
  const name = named.find((part) => typeof part === "string" && part) ?? "";
  const base = name.split(/[\\/]/).at(-1).replace(/\.(safetensors|sft)$/, "");
  const safe = base.replace(/[^\w.-]+/g, "-").slice(0, 80);
  const two = (number) => String(number).padStart(2, "0");
  const date = [now.getFullYear(), two(now.getMonth() + 1), two(now.getDate())].join("-");
  return [`mxfp8-${kind}`, safe, date].filter(Boolean).join("-") + ".png";
}

/**
 * The regular expression for `exclude` that keeps these layers too, and no other: "proj_out" is not
 * "blocks.0.proj_out". A report's names lack the prefixes of diffusion models (quant/format.py).
 *
 * @param {string} present what `exclude` has now
 */
export function excluding(layers, present = "") {
  const names = layers.map((name) => name.replace(/[^\w-]/g, "\\$&"));
  const added = `^((diffusion_)?model\\.|net\\.|core\\.)*(${names.join("|")})\\.weight$`;
  return [present, added].filter(Boolean).join("|");
}

/** A layer of a budget as a row: its bytes are what keeping it costs. */
function budgeted({ name, damage, bytes: cost, kept }) {
  return { name, damage, cost, decision: kept ? KEPT : "mxfp8" };
}

/** The LoRAs of a model as rows. */
function adapters(model, side = "") {
  return (model?.adapters ?? []).map(({ kinds, strength, ...adapter }) => {
    const at = strength === null ? "" : t(", strength [strength]", { strength: +strength.toPrecision(6) });
    return { ...adapter, name: `${side}${kinds.join(", ")}${at}` };
  });
}

/** Seeds beyond the integers that JavaScript represents exactly stay text. */
function exact(key, v, context) {
  return key === "seed" && !Number.isSafeInteger(v) ? context?.source ?? v : v;
}

/** The value of a measure on a row, or NaN. */
export function value(row, measure) {
  const v = row[measure.key];
  return typeof v === "number" ? v : NaN;
}

/**
 * The sort orders for a measure: steps and seeds have no size, and their names are numbers.
 *
 * @returns {[string, string][]} key and label
 */
export function orders(measure) {
  const layers = measure?.rows === "layers";
  return Object.entries(ORDERS)
    .filter(([, order]) => layers || !order.layersOnly)
    .map(([key, { label }]) => [key, label]);
}

/**
 * The rows to draw, filtered and sorted.
 *
 * @param {object[]} rows
 * @param {Measure} measure
 * @param {string} order a key of `orders`
 * @param {string} filter words that must all occur in a row's name, decision, backend or reason
 */
export function arrange(rows, measure, order, filter = "") {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const matching = rows.filter((row) => {
    const known = [row.name, row.decision, title(group(row)), row.backend, row.precision, row.dtype];
    const reason = row.reason ? [row.reason, translated(row.reason)] : [];
    const text = [...known, ...reason].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const { compare } = ORDERS[order];
  return compare ? matching.sort((a, b) => compare(a, b, measure)) : matching;
}

function size(row) {
  return row.bytes_after ?? row.bytes ?? 0;
}

/** Rows without a value come last. */
function badness(row, measure) {
  const v = value(row, measure);
  return isNaN(v) ? Infinity : measure.higher ? v : -v;
}

/** The group that gives a row its color: the backend that runs it, else its format. */
export function group(row) {
  if (row.decision === KEPT) return KEPT;
  return row.backend ?? row.decision ?? "";
}

/** What a reader sees of a group. */
export function title(name) {
  return { [KEPT]: t("not quantized"), mxfp8: "MXFP8" }[name] ?? name;
}

/** [group, number of rows] in order of appearance, what is not quantized last. */
export function groups(rows) {
  const counts = new Map();
  for (const row of rows) counts.set(group(row), (counts.get(group(row)) ?? 0) + 1);
  return [...counts].filter(([name]) => name).sort((a, b) => isKept(a[0]) - isKept(b[0]));
}

/** Whether a group is that of what is not quantized. */
export function isKept(name) {
  return name === KEPT;
}

/**
 * Everything known about a row.
 *
 * @returns {[string, string][]} label and text
 */
export function describe(row) {
  const lines = [];
  const add = (label, text) => text && lines.push([label, text]);
  add(t("Shape"), row.shape && `${row.shape.join(" x ")} ${row.dtype ?? ""}`.trim());
  const format = [row.decision && title(row.decision), row.backend, row.precision];
  add(t("Format"), format.filter(Boolean).join(", "));
  if (row.weight_form && row.weight_form !== "stored") add(t("Weight prepared as"), row.weight_form);
  add(t("Expected output error"), row.expected_error && relative(row.expected_error));
  add(t("Reason"), row.reason && translated(row.reason));
  add(t("Rank"), row.ranks && [...new Set(row.ranks)].join(t(" to ")));
  for (const [how, count] of Object.entries(row.applied ?? {})) add(t("Layers"), `${count} ${how}`);
  add(t("Linear layers without it"), row.missed?.toString());
  if (row.decision === "mxfp8" && row.sqnr_db === null) add(t("SQNR"), t("lossless"));
  for (const measure of MEASURES) {
    if (!isFinite(value(row, measure))) continue;
    const outline = row[measure.outline];
    const beside = typeof outline === "number";
    add(measure.label, measure.format(row[measure.key])
      + (beside ? ` (${measure.outlineLabel} ${measure.format(outline)})` : ""));
  }
  const worst = row.worst_block;
  if (worst) {
    const { row: at, block } = worst;
    add(t("Worst block"), t("row [row], block [block]: [sqnr]", {
      row: at, block, sqnr: decibels(worst.sqnr_db),
    }));
  }
  return lines;
}

/** What the chart shows of a row, as one sentence for a screen reader. */
export function sentence(row, measure, threshold) {
  const v = value(row, measure);
  const outline = row[measure.outline];
  return [
    row.name,
    title(group(row)),
    isNaN(v) ? "" : `${measure.label} ${measure.format(v)}`,
    v < threshold ? t("below the threshold of [value]", { value: measure.format(threshold) }) : "",
    typeof outline === "number" ? `${measure.outlineLabel} ${measure.format(outline)}` : "",
    row.shape ? row.shape.join(t(" by ")) : "",
    row.reason && (isNaN(v) || row.decision === KEPT) ? translated(row.reason) : "",
  ].filter(Boolean).join(", ");
}

export function decibels(v) {
  return `${v.toFixed(2)} dB`;
}

function relative(v) {
  return v === 0 ? "0" : v.toExponential(2);
}

function ratio(v) {
  return v.toFixed(4);
}

function microseconds(v) {
  if (v >= 999500) return `${digits(v / 1e6)} s`;
  return v >= 999.5 ? `${digits(v / 1000)} ms` : `${digits(v)} \u00b5s`;
}

/** Three digits, as the reports' text has them. */
function digits(v) {
  return v.toFixed(v < 9.995 ? 2 : v < 99.95 ? 1 : 0);
}

/** A size in decimal units, as on disks and model pages. */
export function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= 0.9995 * size) return `${digits(count / size)} ${unit}`;
  }
  return `${count} B`;
}
