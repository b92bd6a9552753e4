/**
 * Pairs of images, the same seed on two models, compared by a slider: left of it the first model's
 * image, right of it the second's. All pairs share the slider, so that one movement shows what the
 * models differ in on every seed. A click enlarges a pair.
 */

import { t } from "./language.mjs";

const SMALL = 128; // px
const STEP = 5; // percent that an arrow key moves the slider

export const STYLE = `
  .pairs { display: grid; gap: 4px; flex: 1 1 0; min-height: 0; --split: 50%;
    grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); grid-auto-rows: minmax(0, 1fr); }
  .pairs figure { position: relative; margin: 0; min-height: 0; overflow: hidden; cursor: ew-resize;
    border-radius: 4px; background: #0002; }
  .pairs.one figure:not(.large) { display: none; }
  .pairs img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
  .pairs img.small { image-rendering: pixelated; }
  .pairs img + img { clip-path: inset(0 0 0 var(--split)); }
  .pairs i { position: absolute; top: 0; bottom: 0; left: var(--split); width: 2px;
    margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; }
  .pairs span { position: absolute; padding: 1px 6px; border-radius: 3px; color: #fff;
    background: #000a; font-size: 11px; pointer-events: none; }
  .pairs .first { top: 4px; left: 4px; }
  .pairs .second { top: 4px; right: 4px; }
  .pairs figcaption { position: absolute; bottom: 4px; left: 4px; padding: 1px 6px; color: #fff;
    background: #000a; border-radius: 3px; font-size: 11px; pointer-events: none; }
`;

export class Pairs {
  constructor() {
    this.element = document.createElement("div");
    this.element.className = "pairs";
    this.element.hidden = true;
  }

  /**
   * @param {{name: string, first: string, second: string}[]} pairs a caption and two addresses each
   * @param {[string, string]} labels what the first and the second images are of
   */
  show(pairs, labels) {
    this.element.hidden = !pairs.length;
    this.element.classList.remove("one");
    this._columns = Math.ceil(Math.sqrt(pairs.length));
    this._arrange();
    this.element.replaceChildren(...pairs.map((pair) => this._figure(pair, labels)));
    this._split(50);
  }

  _figure({ name, first, second }, labels) {
    const figure = document.createElement("figure");
    figure.tabIndex = 0;
    figure.role = "slider";
    figure.ariaLabel = t("[name]: [first] at the left, [second] at the right", {
      name, first: labels[0], second: labels[1],
    });
    figure.append(
      ...[first, second].map(picture),
      document.createElement("i"),
      ...labels.map((label, index) => text("span", label, index ? "second" : "first")),
      text("figcaption", name),
    );
    figure.addEventListener("pointermove", (event) => {
      const box = figure.getBoundingClientRect();
      this._split(((event.clientX - box.left) / box.width) * 100);
    });
    figure.addEventListener("click", () => this._enlarge(figure));
    figure.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -STEP, ArrowRight: STEP }[event.key];
      if (move) this._split(this._at + move);
      else if (event.key === "Enter" || event.key === " ") this._enlarge(figure);
      else return;
      event.preventDefault();
    });
    return figure;
  }

  _split(percent) {
    this._at = Math.min(Math.max(percent, 0), 100);
    this.element.style.setProperty("--split", `${this._at}%`);
    for (const figure of this.element.children) figure.ariaValueNow = Math.round(this._at);
  }

  /** One pair alone, or all again. */
  _enlarge(figure) {
    const one = this.element.children.length > 1 && this.element.classList.toggle("one");
    for (const other of this.element.children) other.classList.toggle("large", other === figure);
    this._arrange(one);
  }

  _arrange(one = false) {
    this.element.style.setProperty("--columns", one ? 1 : this._columns);
  }
}

function picture(address) {
  const image = Object.assign(new Image(), { src: address, alt: "" });
  // Of a small image, visible pixels are better than blur.
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < SMALL));
  return image;
}

function text(kind, content, name = "") {
  const element = document.createElement(kind);
  element.className = name;
  element.textContent = content;
  return element;
}
