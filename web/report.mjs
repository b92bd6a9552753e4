/**
 * The report view: a verdict in one line, below images if there are any. A button opens the rest: a
 * bar chart, the details of the bar under the pointer, and the whole summary. A text without a
 * document has the first and the last of these.
 *
 * Its height depends on nothing but whether it is open, so that no result and no pointer moves what
 * is around it. It is one element with a shadow root, which isolates its styles from the page's. It knows documents
 * (`document.mjs`), not ComfyUI. The bars are a list box: arrow keys move between them, and a screen
 * reader reads each as a sentence. Positions are fractions of an element's measured size, because the
 * canvas zooms by scaling elements.
 */

import * as documents from "./document.mjs";
import * as charts from "./chart.mjs";
import * as curves from "./curve.mjs";
import { t, translated } from "./language.mjs";
import * as pairs from "./pairs.mjs";

const HEIGHT = 150; // px, of the bars
/** How high a view is in px, and how much higher when it is open. */
const SHAPES = {
  report: { closed: 92, rest: 430 }, // a verdict of three lines and the buttons
  text: { closed: 92, rest: 320 }, // for nodes without a document
  line: { closed: 48, rest: 200 }, // two lines, and a button beside them
};
const STYLE = `
  :host {
    --mx-text: var(--input-text, #ddd);
    --mx-soft: var(--descrip-text, #999);
    --mx-back: var(--comfy-menu-bg, #171718);
    --mx-line: var(--border-color, #4e4e4e);
    --mx-bad: #e5484d; --mx-notice: #d98a1f; --mx-good: #2f9e6e;
    display: block; width: 100%; height: 100%; overflow: hidden; box-sizing: border-box;
    contain: size; min-height: var(--mx-closed);
    font: 12px system-ui, sans-serif; color: var(--mx-text); background: var(--mx-back);
    border-radius: 8px; user-select: text;
  }
  [hidden] { display: none !important; }
  :host(.open) { min-height: calc(var(--mx-closed) + var(--mx-rest)); }
  .all { display: flex; flex-direction: column; gap: 6px; padding: 8px; height: 100%;
    box-sizing: border-box; overflow: hidden; }
  .all.line { flex-flow: row wrap; align-content: flex-start; padding: 7px 8px; }
  .all.line .verdict { flex: 1; max-height: 34px; -webkit-line-clamp: 2; }
  .all.line .rest { flex-basis: 100%; }
  .all.text .rest { flex-grow: 1; }
  .verdict { line-height: 17px; max-height: 51px; overflow: hidden; overflow-wrap: anywhere;
    white-space: pre-line; flex: none; padding-left: 15px; display: -webkit-box;
    -webkit-box-orient: vertical; -webkit-line-clamp: 3; }
  .verdict::before { content: ""; display: inline-block; width: 9px; height: 9px;
    margin: 0 6px 0 -15px; border-radius: 50%; background: var(--mx-soft); }
  .verdict[data-level=good]::before { background: var(--mx-good); }
  .verdict[data-level=notice]::before { background: var(--mx-notice); }
  .verdict[data-level=bad]::before { background: var(--mx-bad); }
  .verdict[data-level=none] { color: var(--mx-soft); padding-left: 0; }
  .verdict[data-level=none]::before { display: none; }
  .actions { display: flex; flex-wrap: wrap; gap: 6px; flex: none; }
  .rest { display: flex; flex-direction: column; gap: 6px; flex: none; min-height: 0;
    height: calc(var(--mx-rest) - 6px); flex-shrink: 1; }
  .summary { white-space: pre-wrap; line-height: 1.45; overflow: auto; overflow-wrap: anywhere;
    flex: 1 1 0; border-top: 1px solid var(--mx-line); padding-top: 6px; }
  .tools { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
  select, input, button { font: inherit; color: inherit; background: transparent;
    border: 1px solid var(--mx-line); border-radius: 4px; padding: 2px 6px; min-width: 0; }
  select { max-width: 110px; }
  .tools:has(> input[hidden]) select { max-width: none; }
  option { color: var(--mx-text); background: var(--mx-back); }
  input { flex: 1 1 50px; width: 50px; }
  button { cursor: pointer; }
  button:disabled { cursor: default; color: var(--mx-soft); }
  :focus-visible { outline: 2px solid #3b8eea; outline-offset: 1px; }
  .legend { display: flex; flex-wrap: wrap; gap: 2px 12px; color: var(--mx-soft); flex: none;
    line-height: 16px; }
  .legend i { display: inline-block; width: 9px; height: 9px; margin-right: 4px; }
  .chart { display: flex; flex: none; }
  .scroll { flex: 1; overflow-x: auto; overflow-y: hidden; }
  .details { color: var(--mx-soft); flex: none; line-height: 17px; height: 85px; overflow: auto; }
  .details div { display: inline-block; margin-right: 14px; }
  .details b { display: block; }
  .details b, .details em { color: var(--mx-text); font-style: normal; overflow-wrap: anywhere; }
  .status { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  svg { display: block; }
  ${charts.STYLE}
  ${curves.STYLE}
  ${pairs.STYLE}
`;

/** A plain div with a shadow root, since a custom element would be registered globally. */
export class ReportView {
  /** @param {string} shape one of `SHAPES` */
  constructor(shape = "report") {
    this._shape = SHAPES[shape];
    this.element = document.createElement("div");
    this.element.className = "mxfp8-report";
    for (const [name, px] of Object.entries(this._shape)) {
      this.element.style.setProperty(`--mx-${name}`, `${px}px`);
    }
    this.element.dataset.captureWheel = "true"; // Nodes 2.0: scrolls while it has the focus
    this.root = this.element.attachShadow({ mode: "open" });
    this.root.innerHTML = `
      <style>${STYLE}</style>
      <section class="all ${shape}">
        <div class="verdict" data-level="none"></div>
        <div class="actions" hidden>
          <button name="open" aria-expanded="false"></button>
          <button name="exclude" hidden></button>
          <button name="copy-exclude" hidden></button>
          <button name="copy" hidden></button>
          <button name="save" hidden></button>
        </div>
        <div class="rest" hidden>
          <div class="tools">
            <select name="measure"></select>
            <select name="order"></select>
            <input name="filter" type="search">
          </div>
          <div class="legend"></div>
          <div class="chart"><div class="axis"></div><div class="scroll"></div></div>
          <div class="details"></div>
          <div class="summary"></div>
        </div>
        <div class="status" role="status"></div>
      </section>`;
    this.part = (selector) => this.root.querySelector(selector);
    this._label();
    this._pairs = new pairs.Pairs();
    this.part(".verdict").before(this._pairs.element);
    this.open = false;
    this._drawn = [];
    this._chosen = -1;
    this._width = 0;
    this._listen();
    this._observer = new ResizeObserver(() => this._resized());
    this._observer.observe(this.element);
  }

  /** Put the texts that stay into their places. */
  _label() {
    this.part(".all").ariaLabel = t("MXFP8 report");
    this.part(".verdict").textContent = t("The result appears here.");
    const [measure, order, filter, copy, save] = ["measure", "order", "filter", "copy", "save"]
      .map((name) => this.part(`[name=${name}]`));
    measure.ariaLabel = t("Measure");
    order.ariaLabel = t("Sort order");
    filter.placeholder = t("filter");
    filter.ariaLabel = t("Filter by name or reason");
    copy.textContent = t("copy JSON");
    copy.title = t("Copy the report as JSON");
    this.part("[name=copy-exclude]").textContent = t("copy exclude");
    save.textContent = t("save PNG");
    save.title = t("Save the chart as a PNG image");
  }

  /**
   * Show a document. The measure and order selected for an earlier one are kept if it has them too.
   *
   * @param {string | null} text JSON from a node, null if it sent only a summary
   * @param {string} summary a few lines of text
   * @param {object[]} images as `Pairs.show` takes them
   * @param {[string, string]} labels of these
   * @param {object} [beside] verdict: in place of the document's; budget: JSON of the model's curve
   */
  show(text, summary, images = [], labels = ["", ""], { verdict, budget } = {}) {
    this.json = text;
    this.summary = summary;
    try {
      this.document = curves.added(documents.read(text), budget);
    } catch (error) { // the page is older than the pack
      this.document = documents.NONE;
      this.summary = `${error.message}; ${t("reload the page")}\n${summary}`.trim();
    }
    this._show(verdict ?? documents.verdict(this.document.data, this.summary));
    this._pairs.show(images, labels);
  }

  /**
   * Show a text without a document.
   *
   * @param {string} text lines
   * @param {object} verdict as `documents.verdict` returns it: what is seen of it while it is closed
   */
  tell(text, verdict = documents.verdict({}, text)) {
    this.json = null;
    this.summary = text;
    this.document = documents.NONE;
    this._show(verdict);
    this._pairs.show([], ["", ""]);
  }

  _show({ level, text, said = text, layers }) {
    this._headline(level, text);
    this._layers = layers ?? [];
    const seen = said.split("\n");
    const lines = this.summary.split("\n"); // names may follow on the last one
    const repeats = seen.every((line, i) => lines[i]?.startsWith(line));
    const rest = lines.slice(repeats ? seen.length : 0).join("\n");
    this.part(".summary").textContent = arrows(translated(rest));
    const { measures } = this.document;
    setOptions(this.part("[name=measure]"), measures.map(({ label }, index) => [index, label]));
    this._offerExclude();
    this._setOpen(this.open);
    this._draw();
    this._offerRest();
  }

  /** Offer to open the view if there is more than what is seen of it. */
  _offerRest() {
    const line = this.part(".verdict");
    const seen = line.textContent.split("\n");
    const more = arrows(this.summary).split("\n").some((part) => part && !seen.includes(part));
    const cut = line.scrollHeight > line.clientHeight;
    this.part(".actions").hidden = !(this.json || more || cut || this.open);
  }

  /** Show how far the work is, or how it ended, in place of the verdict. */
  progress(text) {
    const failed = text.startsWith("failed") ? "bad" : "";
    this._headline(text === "interrupted" ? "notice" : failed, text);
  }

  _headline(level, text) {
    const line = this.part(".verdict");
    line.textContent = arrows(text);
    line.title = line.textContent;
    line.dataset.level = level;
  }

  /** What a click on "exclude these layers" does with their names; without it there is no button. */
  set exclude(act) {
    this._exclude = act;
    this._offerExclude();
  }

  _offerExclude() {
    const count = this._layers?.length ?? 0;
    const button = this.part("[name=exclude]");
    button.hidden = !count || !this._exclude;
    button.disabled = false;
    button.textContent = count === 1
      ? t("exclude this layer") : t("exclude these [count] layers", { count });
    button.title = `${t("Leave unquantized:")}\n${this._layers?.join("\n")}`;
  }

  _setOpen(open) {
    const button = this.part("[name=open]");
    const [show, hide] = this.document?.data.layers?.length
      ? [t("show layers"), t("hide layers")]
      : this.json ? [t("show details"), t("hide details")] : [t("show all"), t("show less")];
    button.textContent = open ? hide : show;
    button.setAttribute("aria-expanded", open);
    this.part(".rest").hidden = !open;
    this.part("[name=copy]").hidden = !open || !this.json;
    this.part("[name=save]").hidden = !open || !this.document?.measures.length;
    this.element.classList.toggle("open", open);
    if (open === this.open) return;
    this.open = open;
    this._offerCopy();
    this.onOpen?.(open); // who owns the view makes room
    if (open && this.document) this._draw();
  }

  /** Height in px that the view needs. */
  get height() {
    return this._shape.closed + (this.open ? this.rest : 0);
  }

  /** How much higher it is when it is open, in px. */
  get rest() {
    return this._shape.rest;
  }

  dispose() {
    this._observer.disconnect();
  }

  get measure() {
    return this.document.measures[Math.max(this.part("[name=measure]").selectedIndex, 0)];
  }

  /** The rows, filtered and sorted; none before there is a document with measures. */
  get rows() {
    const measure = this.measure;
    if (!measure) return [];
    if (measure.curve) return this.document.rows[measure.rows];
    const order = this.part("[name=order]").value;
    const all = this.document.rows[measure.rows];
    return documents.arrange(all, measure, order, this.part("[name=filter]").value);
  }

  _listen() {
    for (const name of ["measure", "order"]) {
      this.part(`[name=${name}]`).addEventListener("change", () => this._draw());
    }
    this.part("[name=filter]").addEventListener("input", () => {
      this._draw();
      this._say(t("[count] bars", { count: this._drawn.length }));
    });
    this.part("[name=copy]").addEventListener("click", () => this._copy("copy", this.json));
    this.part("[name=copy-exclude]").addEventListener("click", () => {
      this._copy("copy-exclude", this._drawn[this._chosen].exclude);
    });
    this.part("[name=save]").addEventListener("click", () => this._save());
    this.part("[name=open]").addEventListener("click", () => this._setOpen(!this.open));
    this.part("[name=exclude]").addEventListener("click", () => {
      this._exclude(this._layers);
      const button = this.part("[name=exclude]");
      button.disabled = true;
      button.textContent = t("excluded in the next run");
    });
    const scroll = this.part(".scroll");
    for (const kind of ["pointermove", "click"]) {
      scroll.addEventListener(kind, (event) => this._choose(this._under(event)));
    }
    scroll.addEventListener("keydown", (event) => this._key(event));
    // Outside the shadow root, events seem to come from a div, and ComfyUI takes keys as shortcuts.
    for (const kind of ["keydown", "keyup", "keypress"]) {
      this.root.addEventListener(kind, (event) => {
        if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
      });
    }
    for (const kind of ["copy", "cut", "paste"]) {
      this.root.addEventListener(kind, (event) => event.stopPropagation());
    }
  }

  /** Whether the wheel would scroll something in this view. */
  scrolls() {
    return [".summary", ".details", ".scroll"].map(this.part).some(
      (part) => part.scrollHeight > part.clientHeight || part.scrollWidth > part.clientWidth,
    );
  }

  _resized() {
    if (this.summary !== undefined) this._offerRest();
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
    const drawing = ".chart, .legend, .details, .tools";
    for (const part of this.root.querySelectorAll(drawing)) part.hidden = !measures.length;
    this._drawn = [];
    this._chosen = -1;
    if (!measures.length) return;
    const measure = this.measure;
    this._offerCopy();
    for (const name of ["order", "filter"]) this.part(`[name=${name}]`).hidden = !!measure.curve;
    setOptions(this.part("[name=order]"), documents.orders(measure));
    this._drawn = this.rows;
    const scroll = this.part(".scroll");
    this._width = scroll.clientWidth;
    const width = Math.max(this._width, 60);
    const at = measure.curve
      ? curves.scale(this._drawn, width, HEIGHT)
      : charts.scale(all[measure.rows], measure, data, HEIGHT);
    this._at = at;
    this._palette = measure.curve ? curves.palette(this._drawn) : charts.colors(all[measure.rows]);
    this._axis = charts.axis(measure, at);
    this._bars = measure.curve
      ? curves.draw(this._drawn, at)
      : charts.bars(this._drawn, measure, at, this._palette, width);
    this.part(".axis").replaceChildren(this._axis);
    scroll.replaceChildren(this._bars);
    this._legend(measure.curve ? null : all[measure.rows]);
    if (measure.curve) return this._choose(curves.initial(this._drawn));
    this.part(".details").textContent = this._drawn.length
      ? t("Point at a bar, or use the arrow keys, for details.")
      : t("No layer matches the filter.");
  }

  /** @param {object[] | null} rows to count by group; null for the names of the palette alone */
  _legend(rows) {
    const names = rows
      ? documents.groups(rows).map(([name, count]) => [name, `${documents.title(name)} ${count}`])
      : [...this._palette.keys()].map((name) => [name, name]);
    this.part(".legend").replaceChildren(
      ...names.map(([name, text]) => {
        const entry = document.createElement("div");
        const color = document.createElement("i");
        color.style.background = this._palette.get(name);
        entry.append(color, text);
        return entry;
      }),
    );
  }

  /** The index of the bar under the pointer, or of the point that is nearest to it. */
  _under(event) {
    const box = this._bars.getBoundingClientRect();
    const zoom = box.width / Number(this._bars.getAttribute("width"));
    const x = (event.clientX - box.left) / zoom;
    if (this.measure.curve) {
      return curves.nearest(this._drawn, this._at, x, (event.clientY - box.top) / zoom);
    }
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
    if (this.measure.curve) return; // it is as wide as the view
    const scroll = this.part(".scroll");
    const step = Number(this._bars.dataset.step);
    const left = this._chosen * step;
    scroll.scrollLeft = Math.max(Math.min(scroll.scrollLeft, left), left + step - scroll.clientWidth);
  }

  /** Select a bar and show its details. */
  _choose(index) {
    const row = this._drawn[index];
    if (!row || index === this._chosen) return;
    this._bars.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const bar = this._bars.querySelector(`#bar-${index}`);
    bar.setAttribute("aria-selected", "true");
    this._bars.setAttribute("aria-activedescendant", bar.id);
    const { curve } = this.measure;
    const step = Number(this._bars.dataset.step);
    if (!curve) this._bars.querySelector(".chosen").setAttribute("x", index * step);
    this._chosen = index;
    this._offerCopy();
    const name = document.createElement("b");
    name.textContent = row.name;
    const lines = curve ? curves.describe(row) : documents.describe(row);
    this.part(".details").replaceChildren(name, ...lines.map(([label, text]) => {
      const line = document.createElement("div");
      const content = document.createElement("em");
      content.textContent = text;
      line.append(t("[label]: ", { label }), content);
      return line;
    }));
  }

  /** Announce to screen readers what would otherwise only be seen. */
  _say(text) {
    this.part(".status").textContent = text;
  }

  /** Offer to copy what `exclude` has to be for the point of the curve that is chosen. */
  _offerCopy() {
    const point = this.measure?.curve ? this._drawn[this._chosen] : null;
    const button = this.part("[name=copy-exclude]");
    button.hidden = !this.open || !point?.exclude;
    button.title = point?.exclude ?? "";
  }

  /** Copy a text, and say so on the button that was clicked. */
  async _copy(name, text) {
    const button = this.part(`[name=${name}]`);
    const label = button.textContent;
    // `clipboard` exists only on pages from localhost or over https.
    const copied = navigator.clipboard
      ? await navigator.clipboard.writeText(text).then(() => true, () => false)
      : copySelected(text, this.root);
    button.disabled = true; // a second click would take the answer for the label
    button.textContent = copied ? t("copied") : t("blocked by the browser");
    this._say(button.textContent);
    setTimeout(() => {
      button.textContent = label;
      button.disabled = false;
    }, 2000);
  }

  async _save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await this.png());
    link.download = documents.pictureName(this.document, new Date());
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  /**
   * The chart as an image, at twice its size on the page.
   *
   * @returns {Promise<Blob>} PNG
   */
  async png() {
    const style = getComputedStyle(this.element);
    const names = ["--mx-text", "--mx-soft", "--mx-back", "--mx-line", "--mx-bad"];
    const theme = Object.fromEntries(names.map((n) => [n, style.getPropertyValue(n).trim()]));
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

/** Replace the options of a select, [value, label]; a label that was chosen stays so. */
function setOptions(select, entries) {
  const chosen = select.selectedOptions[0]?.text;
  select.replaceChildren(...entries.map(([value, label]) => new Option(label, value)));
  const again = entries.find(([, label]) => label === chosen);
  if (again) select.value = again[0];
}

/** A text with arrows, for which the server's texts have "->". */
function arrows(text) {
  return text.replaceAll(" -> ", " \u2192 ");
}

/** Copy through a selection, which works without the clipboard API. */
function copySelected(text, root) {
  const area = document.createElement("textarea");
  area.value = text;
  root.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}
