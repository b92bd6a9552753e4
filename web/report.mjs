/**
 * The report view: summary, bars, and what there is to know of the bar under the pointer.
 *
 * It is one element with a shadow root, so that its style reaches nothing else and nothing else
 * reaches it; it knows documents (`document.mjs`), not ComfyUI. The bars are a list box: arrow keys
 * walk them, and a screen reader reads each as a sentence. Positions are taken as fractions of what
 * the page measures, since the canvas zooms by scaling elements.
 */

import * as documents from "./document.mjs";
import * as charts from "./chart.mjs";

const HEIGHT = 150; // px, of the bars
const FEW_LINES = 6; // of a summary, before "more"
const STYLE = `
  :host {
    --mx-text: var(--input-text, #ddd);
    --mx-soft: var(--descrip-text, #999);
    --mx-back: var(--comfy-menu-bg, #171718);
    --mx-line: var(--border-color, #4e4e4e);
    --mx-bad: #e5484d;
    display: block; width: 100%; height: 100%; overflow: hidden; box-sizing: border-box;
    font: 12px system-ui, sans-serif; color: var(--mx-text); background: var(--mx-back);
    border-radius: 8px; user-select: text;
  }
  [hidden] { display: none !important; }
  .all { display: flex; flex-direction: column; gap: 6px; padding: 8px; height: 100%;
    box-sizing: border-box; overflow: auto; }
  .summary { white-space: pre-line; line-height: 1.45; overflow-wrap: anywhere; flex: none; }
  .tools { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
  select, input, button { font: inherit; color: inherit; background: transparent;
    border: 1px solid var(--mx-line); border-radius: 4px; padding: 2px 6px; min-width: 0; }
  select { max-width: 110px; }
  option { color: var(--mx-text); background: var(--mx-back); }
  input { flex: 1 1 50px; width: 50px; }
  button { cursor: pointer; }
  .more { align-self: flex-start; padding: 0 6px; flex: none; }
  :focus-visible { outline: 2px solid #3b8eea; outline-offset: 1px; }
  .legend { display: flex; flex-wrap: wrap; gap: 2px 12px; color: var(--mx-soft); flex: none; }
  .legend i { display: inline-block; width: 9px; height: 9px; margin-right: 4px; }
  .chart { display: flex; flex: none; }
  .scroll { flex: 1; overflow-x: auto; overflow-y: hidden; }
  .details { color: var(--mx-soft); flex: none; line-height: 1.45; }
  .details b, .details em { color: var(--mx-text); font-style: normal; overflow-wrap: anywhere; }
  .status { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  svg { display: block; }
  ${charts.STYLE}
`;
const TOOLS = `
  <select name="measure" aria-label="What the bars show"></select>
  <select name="order" aria-label="Order of the bars"></select>
  <input name="filter" type="search" placeholder="filter"
    aria-label="Show only bars with these words">
  <button name="copy" title="Copy the report as JSON">copy JSON</button>
  <button name="save" title="Save the chart as a picture">save PNG</button>`;

/** A custom element would be global; this is a plain div with a shadow root. */
export class ReportView {
  /** Height in px that the view needs to be read without scrolling. */
  static height = 420;

  constructor() {
    this.element = document.createElement("div");
    this.element.className = "mxfp8-report";
    this.element.dataset.captureWheel = "true"; // of Nodes 2.0: scrolls while it has the focus
    this.root = this.element.attachShadow({ mode: "open" });
    this.root.innerHTML = `
      <style>${STYLE}</style>
      <section class="all" aria-label="MXFP8 report">
        <div class="summary"></div>
        <button class="more"></button>
        <div class="tools">${TOOLS}</div>
        <div class="legend"></div>
        <div class="chart"><div class="axis"></div><div class="scroll"></div></div>
        <div class="details"></div>
        <div class="status" role="status"></div>
      </section>`;
    this.part = (selector) => this.root.querySelector(selector);
    this._drawn = [];
    this._chosen = -1;
    this._width = 0;
    this._listen();
    this._observer = new ResizeObserver(() => this._resized());
    this._observer.observe(this.element);
  }

  /**
   * Show a document. What the user chose of an earlier one stays, where it still is a choice.
   *
   * @param {string} text JSON from a node
   * @param {string} summary a few lines for people
   */
  show(text, summary) {
    this.json = text;
    this.summary = summary;
    try {
      this.document = documents.read(text);
    } catch (error) { // an older page on a newer pack
      this.document = { kind: "unknown", measures: [], rows: {}, data: {} };
      this.summary = `${summary}\n${error.message}; reload the page`.trim();
    }
    this._expand(false);
    choices(this.part("[name=measure]"), this.document.measures.map((m) => m.label));
    this._draw();
  }

  dispose() {
    this._observer.disconnect();
  }

  get measure() {
    return this.document.measures[Math.max(this.part("[name=measure]").selectedIndex, 0)];
  }

  /** The rows as drawn. */
  get rows() {
    const order = this.part("[name=order]").value;
    const all = this.document.rows[this.measure.rows];
    return documents.arrange(all, this.measure, order, this.part("[name=filter]").value);
  }

  _listen() {
    for (const name of ["measure", "order"]) {
      this.part(`[name=${name}]`).addEventListener("change", () => this._draw());
    }
    this.part("[name=filter]").addEventListener("input", () => {
      this._draw();
      this._say(`${this._drawn.length} bars`);
    });
    this.part("[name=copy]").addEventListener("click", () => this._copy());
    this.part("[name=save]").addEventListener("click", () => this._save());
    this.part(".more").addEventListener("click", () => this._expand(!this._expanded));
    const scroll = this.part(".scroll");
    scroll.addEventListener("pointermove", (event) => this._choose(this._under(event)));
    scroll.addEventListener("click", (event) => this._choose(this._under(event)));
    scroll.addEventListener("keydown", (event) => this._key(event));
    // Outside a shadow root its input looks like a div, and ComfyUI would take keys as shortcuts.
    for (const kind of ["keydown", "keyup", "keypress"]) {
      this.root.addEventListener(kind, (event) => {
        if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
      });
    }
    for (const kind of ["copy", "cut", "paste"]) {
      this.root.addEventListener(kind, (event) => event.stopPropagation());
    }
  }

  /** Whether a turn of the wheel would scroll something in here. */
  scrolls() {
    const all = this.part(".all");
    const scroll = this.part(".scroll");
    return all.scrollHeight > all.clientHeight || scroll.scrollWidth > scroll.clientWidth;
  }

  _expand(expanded) {
    this._expanded = expanded;
    const lines = this.summary.split("\n");
    const shown = expanded ? lines : lines.slice(0, FEW_LINES);
    const more = this.part(".more");
    this.part(".summary").textContent = shown.join("\n");
    more.hidden = lines.length <= FEW_LINES;
    more.textContent = expanded ? "less" : `${lines.length - FEW_LINES} more lines`;
    more.setAttribute("aria-expanded", expanded);
  }

  _resized() {
    const width = this.part(".scroll").clientWidth;
    if (!this.document || !width || width === this._width) return;
    const chosen = this._chosen;
    const focused = this.root.activeElement === this._bars;
    this._draw();
    this._choose(chosen);
    if (focused) this._bars?.focus();
  }

  _draw() {
    const { data, measures, rows: all } = this.document;
    for (const part of [".chart", ".legend", ".details", ".tools > :not([name=copy])"]) {
      for (const found of this.root.querySelectorAll(part)) found.hidden = !measures.length;
    }
    this._drawn = [];
    this._chosen = -1;
    if (!measures.length) return;
    const measure = this.measure;
    choices(this.part("[name=order]"), documents.orders(measure));
    this._drawn = this.rows;
    const at = charts.scale(all[measure.rows], measure, data, HEIGHT);
    this._palette = charts.colors(all[measure.rows]);
    const scroll = this.part(".scroll");
    this._width = scroll.clientWidth;
    this._axis = charts.axis(measure, at);
    this._bars = charts.bars(this._drawn, measure, at, this._palette, Math.max(this._width, 60));
    this.part(".axis").replaceChildren(this._axis);
    scroll.replaceChildren(this._bars);
    this._legend(all[measure.rows]);
    this.part(".details").textContent = this._drawn.length
      ? "Point at a bar, or walk them with the arrow keys."
      : "Nothing has these words.";
  }

  _legend(rows) {
    this.part(".legend").replaceChildren(
      ...documents.groups(rows).map(([name, count]) => {
        const entry = document.createElement("div");
        const color = document.createElement("i");
        color.style.background = this._palette.get(name);
        entry.append(color, `${name} ${count}`);
        return entry;
      }),
    );
  }

  /** The index of the bar under the pointer. */
  _under(event) {
    const box = this._bars.getBoundingClientRect();
    const width = Number(this._bars.getAttribute("width"));
    const x = ((event.clientX - box.left) / box.width) * width;
    return Math.floor(x / Number(this._bars.dataset.step));
  }

  _key(event) {
    const last = this._drawn.length - 1;
    const moves = {
      ArrowLeft: this._chosen - 1, ArrowUp: this._chosen - 1,
      ArrowRight: this._chosen + 1, ArrowDown: this._chosen + 1,
      PageUp: this._chosen - 10, PageDown: this._chosen + 10, Home: 0, End: last,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this._choose(Math.min(Math.max(moves[event.key], 0), last));
    const step = Number(this._bars.dataset.step);
    this._scrollTo(this._chosen * step, step);
  }

  /** Make a bar the chosen one and say what is known of it. */
  _choose(index) {
    const row = this._drawn[index];
    if (!row || index === this._chosen) return;
    this._bars.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const bar = this._bars.querySelector(`#bar-${index}`);
    bar.setAttribute("aria-selected", "true");
    this._bars.setAttribute("aria-activedescendant", bar.id);
    this._bars.querySelector(".chosen").setAttribute("x", index * Number(this._bars.dataset.step));
    this._chosen = index;
    const name = document.createElement("b");
    name.textContent = row.name;
    this.part(".details").replaceChildren(name, ...documents.describe(row).map(([label, text]) => {
      const line = document.createElement("div");
      const said = document.createElement("em");
      said.textContent = text;
      line.append(`${label}: `, said);
      return line;
    }));
  }

  _scrollTo(x, step) {
    const scroll = this.part(".scroll");
    if (x < scroll.scrollLeft) scroll.scrollLeft = x;
    const right = x + step - scroll.clientWidth;
    if (right > scroll.scrollLeft) scroll.scrollLeft = right;
  }

  /** For a screen reader, what else would only be seen. */
  _say(text) {
    this.part(".status").textContent = text;
  }

  async _copy() {
    const button = this.part("[name=copy]");
    // `clipboard` is missing on pages that come neither from localhost nor over https.
    const copied = navigator.clipboard
      ? await navigator.clipboard.writeText(this.json).then(() => true, () => false)
      : copySelected(this.json, this.root);
    button.textContent = copied ? "copied" : "not allowed by the browser";
    this._say(button.textContent);
    setTimeout(() => { button.textContent = "copy JSON"; }, 2000);
  }

  async _save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await this.png());
    link.download = `mxfp8-${this.document.kind.toLowerCase()}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  /**
   * The chart as a picture, at twice its size on the page.
   *
   * @returns {Promise<Blob>} PNG
   */
  async png() {
    const found = getComputedStyle(this.element);
    const names = ["--mx-text", "--mx-soft", "--mx-back", "--mx-line", "--mx-bad"];
    const theme = Object.fromEntries(names.map((n) => [n, found.getPropertyValue(n).trim()]));
    const { text, width, height } = charts.picture(
      `${this.summary}\n${this.measure.label}`,
      { axis: this._axis, bars: this._bars, palette: this._palette },
      theme,
    );
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = 2 * width;
    canvas.height = 2 * height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return new Promise((done) => { canvas.toBlob(done, "image/png"); });
  }
}

/** Give a select these options, and keep what was chosen if it is one of them. */
function choices(select, labels) {
  const chosen = select.value;
  select.replaceChildren(...labels.map((label) => {
    const option = document.createElement("option");
    option.textContent = label;
    return option;
  }));
  if (labels.includes(chosen)) select.value = chosen;
}

/** Copy by way of a selection: the old way, which needs no permission. */
function copySelected(text, root) {
  const area = document.createElement("textarea");
  area.value = text;
  root.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}
