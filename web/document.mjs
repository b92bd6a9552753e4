/**
 * What can be drawn of a document that a node sent: its rows, and what is measured on them.
 *
 * The nodes send JSON with a version key, one of `KINDS`. Entries of all kinds share the names of
 * their fields (`quant/report.py`), so that a measure is there when a row has a value for it, and no
 * kind needs code of its own. Nothing here touches the page.
 */

const KINDS = {
  mxfp8_report: "Conversion",
  mxfp8_inspection: "Inspection",
  mxfp8_backend_report: "Backend report",
  mxfp8_comparison: "Comparison",
  mxfp8_certificate: "Comparison", // its name in older files
};
const VERSION = 1;

/**
 * Measures in order of preference.
 *
 * @typedef {object} Measure
 * @property {string} key the field of a row
 * @property {string} label
 * @property {string} rows which list of the document has it
 * @property {(value: number) => string} format
 * @property {boolean} [higher] whether more is better
 * @property {boolean} [floating] whether its axis may start above zero (decibels have no zero)
 * @property {string} [before] the field that is drawn as an outline
 * @property {string} [threshold] the field of the document that is drawn as a line
 * @type {Measure[]}
 */
const MEASURES = [
  { key: "output_error", label: "Output error", rows: "layers", format: relative,
    before: "nearest_error" },
  { key: "sqnr_db", label: "SQNR", rows: "layers", format: decibels, higher: true, floating: true,
    threshold: "min_sqnr_db" },
  { key: "microseconds", label: "Time", rows: "layers", format: microseconds },
  { key: "bytes_after", label: "Bytes", rows: "layers", format: bytes, before: "bytes_before" },
  { key: "bytes", label: "Bytes", rows: "layers", format: bytes },
  { key: "divergence", label: "Divergence by step", rows: "steps", format: relative },
  { key: "latent_snr_db", label: "Latent SNR by seed", rows: "seeds", format: decibels,
    higher: true, floating: true },
  { key: "psnr_db", label: "PSNR by seed", rows: "seeds", format: decibels, higher: true,
    floating: true },
  { key: "ssim", label: "SSIM by seed", rows: "seeds", format: ratio, higher: true },
];

/**
 * Read a document.
 *
 * @param {string} text JSON
 * @returns {{kind: string, measures: Measure[], rows: Record<string, object[]>, data: object}}
 * @throws {Error} it is none of the kinds, or of another version
 */
export function read(text) {
  const data = JSON.parse(text, exact);
  const key = Object.keys(KINDS).find((kind) => kind in data);
  if (key === undefined || data[key] !== VERSION) {
    throw new Error(`not a document that this view can draw (${key ?? "unknown"} ${data[key]})`);
  }
  const rows = {
    layers: data.layers ?? [],
    steps: (data.steps ?? []).map((step) => ({ ...step, name: `step ${step.step}` })),
    seeds: (data.seeds ?? []).map((seed) => ({ ...seed, name: `seed ${seed.seed}` })),
  };
  const measures = MEASURES.filter((m) => rows[m.rows].some((row) => isFinite(value(row, m))));
  return { kind: KINDS[key], measures, rows, data };
}

/** A seed may be larger than what a number of JavaScript holds; it stays text then. */
function exact(key, v, context) {
  return key === "seed" && !Number.isSafeInteger(v) ? context?.source ?? v : v;
}

/** The value of a measure on a row; NaN where it has none. */
export function value(row, measure) {
  const found = row[measure.key];
  return typeof found === "number" ? found : NaN;
}

/** Orders of the rows of a measure: steps and seeds have no size, and their names are numbers. */
export function orders(measure) {
  const all = ["in order", "worst first", "largest first", "by name"];
  return measure?.rows === "layers" ? all : all.slice(0, 2);
}

/**
 * The rows to draw: those that a filter leaves, in an order.
 *
 * @param {object[]} rows
 * @param {Measure} measure
 * @param {string} order one of `orders`
 * @param {string} filter words that all have to occur in a row's name, decision, backend or reason
 */
export function arrange(rows, measure, order, filter = "") {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const found = rows.filter((row) => {
    const text = [row.name, row.decision, row.backend, row.precision, row.reason, row.dtype]
      .join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const size = (row) => row.bytes_after ?? row.bytes ?? 0;
  const badness = (row) => {
    const v = value(row, measure);
    return isNaN(v) ? Infinity : measure.higher ? v : -v; // rows without a value come last
  };
  if (order === "worst first") found.sort((a, b) => badness(a) - badness(b) || 0);
  if (order === "largest first") found.sort((a, b) => size(b) - size(a));
  if (order === "by name") found.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return found;
}

/** What a row is drawn as: the backend that runs it, else what became of it. */
export function group(row) {
  if (row.decision === "kept") return "kept";
  return row.backend ?? row.decision ?? "";
}

/** [group, number of rows] in order of appearance, "kept" last. */
export function groups(rows) {
  const counts = new Map();
  for (const row of rows) counts.set(group(row), (counts.get(group(row)) ?? 0) + 1);
  return [...counts].filter(([name]) => name).sort((a, b) => (a[0] === "kept") - (b[0] === "kept"));
}

/**
 * The range of the axis.
 *
 * @returns {{low: number, high: number, threshold: number | undefined}}
 */
export function range(rows, measure, data) {
  const threshold = measure.threshold && data[measure.threshold];
  const values = rows.flatMap((row) => [value(row, measure), row[measure.before]])
    .filter((v) => typeof v === "number" && isFinite(v));
  if (threshold !== undefined) values.push(threshold);
  let low = 0;
  let high = Math.max(...values, 0);
  if (measure.floating && values.length) {
    low = Math.floor((Math.min(...values) - 1) / 2) * 2;
    high = Math.ceil(high);
  }
  return { low, high: high > low ? high : low + 1, threshold };
}

/**
 * All that is known of a row, for people.
 *
 * @returns {[string, string][]} label and text
 */
export function describe(row) {
  const text = [];
  const add = (label, part) => part && text.push([label, part]);
  add("shape", row.shape && `${row.shape.join(" x ")} ${row.dtype ?? ""}`.trim());
  add("became", [row.decision, row.backend, row.precision].filter(Boolean).join(", "));
  add("why", row.reason);
  if (row.bytes_before !== undefined) {
    add("size", `${bytes(row.bytes_before)} to ${bytes(row.bytes_after)}`);
  } else if (row.bytes !== undefined) {
    add("size", bytes(row.bytes));
  }
  if (row.decision === "mxfp8" && row.sqnr_db === null && row.bytes_before !== undefined) {
    add("SQNR", "nothing lost");
  }
  for (const measure of MEASURES) {
    if (measure.label !== "Bytes" && isFinite(value(row, measure))) {
      add(measure.label.replace(/ by .*/, ""), measure.format(row[measure.key]));
    }
  }
  if (row.nearest_error) add("rounded to nearest", relative(row.nearest_error));
  const worst = row.worst_block;
  if (worst) {
    add("worst block", `row ${worst.row}, block ${worst.block}: ${decibels(worst.sqnr_db)}`);
  }
  return text;
}

/** One sentence on a row, for a screen reader: all that the chart shows of it. */
export function sentence(row, measure, threshold) {
  const v = value(row, measure);
  const before = row[measure.before];
  return [
    row.name,
    group(row),
    isNaN(v) ? "" : `${measure.label} ${measure.format(v)}`,
    v < threshold ? `below the threshold of ${measure.format(threshold)}` : "",
    typeof before === "number" ? `before ${measure.format(before)}` : "",
    row.shape ? row.shape.join(" by ") : "",
    isNaN(v) || row.decision === "kept" ? row.reason : "",
  ].filter(Boolean).join(", ");
}

export function decibels(v) {
  return `${v.toFixed(2)} dB`;
}

export function relative(v) {
  return v === 0 ? "0" : v.toExponential(2);
}

export function ratio(v) {
  return v.toFixed(4);
}

export function microseconds(v) {
  return v >= 1000 ? `${(v / 1000).toFixed(2)} ms` : `${v.toFixed(1)} \u00b5s`;
}

/** A size in decimal units, as disks and model pages have it. */
export function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(2)} ${unit}`;
  }
  return `${count} B`;
}
