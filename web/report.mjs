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
  .all { display: flex; flex-direction: column; gap: 6px; padding: 8px; height: 100%;
    box-sizing: border-box; }
  .summary { white-space: pre-line; line-height: 1.45; overflow: auto; overflow-wrap: anywhere;
    max-height: 11.6em; flex: none; }
  .tools { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
  select, input, button { font: inherit; color: inherit; background: transparent;
    border: 1px solid var(--mx-line); border-radius: 4px; padding: 2px 6px; min-width: 0; }
  option { color: var(--mx-text); background: var(--mx-back); }
  input { flex: 1 1 50px; width: 50px; }
  button { cursor: pointer; }
  :focus-visible { outline: 2px solid #3b8eea; outline-offset: 1px; }
  .legend { display: flex; flex-wrap: wrap; gap: 2px 12px; color: var(--mx-soft); flex: none; }
  .legend i { display: inline-block; width: 9px; height: 9px; margin-right: 4px; }
  .chart { display: flex; flex: none; }
  .scroll { flex: 1; overflow-x: auto; overflow-y: hidden; }
  .details { color: var(--mx-soft); min-height: 0; flex: 1 1 auto; overflow: auto; line-height: 1.45; }
  .details b, .details em { color: var(--mx-text); font-style: normal; overflow-wrap: anywhere; }
  svg { display: block; }
  ${charts.STYLE}
`;

/** The element `<mxfp8-report>` would be global; this is a plain div with a shadow root. */
export class ReportView {
  /** Height in px that the view needs to be read without scrolling. */
  static height = 420;

  constructor() {
    this.element = document.createElement("div");
    this.element.className = "mxfp8-report";
    this.root = this.element.attachShadow({ mode: "open" });
    this.root.innerHTML = `
      <style>${STYLE}</style>
      <section class="all" aria-label="MXFP8 report">
        <div class="summary"></div>
        <div class="tools">
          <select name="measure" aria-label="What the bars show"></select>
          <select name="order" aria-label="Order of the bars"></select>
          <input name="filter" type="search" placeholder="filter"
            aria-label="Show only bars with these words">
          <button name="copy" title="Copy the report as JSON">copy JSON</button>
          <button name="save" title="Save the chart as a picture">save PNG</button>
        </div>
        <div class="legend"></div>
        <div class="chart"><div class="axis"></div><div class="scroll"></div></div>
        <div class="details" aria-live="polite"></div>
      </section>`;
    this.part = (selector) => this.root.querySelector(selector);
    this.part("[name=order]").append(...documents.ORDERS.map(option));
    this._listen();
    this._width = 0;
    this._observer = new ResizeObserver(() => this._resized());
    this._observer.observe(this.element);
  }

  /**
   * Show a document.
   *
   * @param {string} text JSON from a node
   * @param {string} summary a few lines for people
   */
  show(text, summary) {
    this.json = text;
    this.summary = summary;
    this.document = documents.read(text);
    this.part(".summary").textContent = summary;
    this.part("[name=measure]").replaceChildren(
      ...this.document.measures.map((m) => option(m.label)),
    );
    this.part("[name=order]").value = documents.ORDERS[0];
    this.part("[name=filter]").value = "";
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
    this.part("[name=filter]").addEventListener("input", () => this._draw());
    this.part("[name=copy]").addEventListener("click", (event) => this._copy(event.target));
    this.part("[name=save]").addEventListener("click", () => this._save());
    const scroll = this.part(".scroll");
    scroll.addEventListener("pointermove", (event) => this._choose(this._under(event)));
    scroll.addEventListener("click", (event) => this._choose(this._under(event)));
    scroll.addEventListener("keydown", (event) => this._key(event));
    // Outside a shadow root its input looks like a div, and ComfyUI would take keys as shortcuts.
    for (const kind of ["keydown", "keyup", "keypress", "copy", "cut", "paste"]) {
      this.root.addEventListener(kind, (event) => event.stopPropagation());
    }
  }

  _resized() {
    const width = this.part(".scroll").clientWidth;
    if (this.document && width && width !== this._width) this._draw();
  }

  _draw() {
    const { data, measures, rows: all } = this.document;
    this.part(".chart").hidden = !measures.length;
    this.part(".details").replaceChildren();
    if (!measures.length) return;
    const measure = this.measure;
    const rows = this.rows;
    const at = charts.scale(all[measure.rows], measure, data, HEIGHT);
    const palette = charts.colours(all[measure.rows]);
    const scroll = this.part(".scroll");
    this._width = scroll.clientWidth;
    this._axis = charts.axis(measure, at);
    this._bars = charts.bars(rows, measure, at, palette, Math.max(this._width, 60));
    this._drawn = rows;
    this._chosen = -1;
    this.part(".axis").replaceChildren(this._axis);
    scroll.replaceChildren(this._bars);
    this._legend(all[measure.rows], palette);
    this.part(".details").textContent = rows.length
      ? "Point at a bar, or walk them with the arrow keys."
      : "No layer has these words.";
  }

  _legend(rows, palette) {
    this.part(".legend").replaceChildren(
      ...documents.groups(rows).map(([name, count]) => {
        const entry = document.createElement("div");
        const colour = document.createElement("i");
        colour.style.background = palette.get(name);
        entry.append(colour, `${name} ${count}`);
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
  }

  /** Make a bar the chosen one and say what is known of it. */
  _choose(index) {
    const row = this._drawn[index];
    if (!row || index === this._chosen) return;
    this._bars.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const bar = this._bars.querySelector(`#bar-${index}`);
    bar.setAttribute("aria-selected", "true");
    this._bars.setAttribute("aria-activedescendant", bar.id);
    const step = Number(this._bars.dataset.step);
    this._bars.querySelector(".chosen").setAttribute("x", index * step);
    this._chosen = index;
    this._scrollTo(index * step, step);
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

  async _copy(button) {
    let said = "copied";
    try {
      await navigator.clipboard.writeText(this.json);
    } catch { // no permission, or a page that is not served from localhost or over https
      said = "not allowed by the browser";
    }
    button.textContent = said;
    setTimeout(() => { button.textContent = "copy JSON"; }, 2000);
  }

  async _save() {
    const link = document.createElement("a");
    const blob = await this.png();
    link.href = URL.createObjectURL(blob);
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
    const title = `${this.summary}\n${this.measure.label}`;
    const { text, width, height } = charts.picture(
      title, { axis: this._axis, bars: this._bars }, theme,
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

function option(text) {
  const made = document.createElement("option");
  made.textContent = text;
  return made;
}
