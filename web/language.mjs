/**
 * The report view's texts in the language of ComfyUI's page.
 *
 * A text is known by its English, which stands in the code and is shown where there is no translation
 * (as in gettext; names of keys would hide what the code says). Translations are in
 * `locales/LANGUAGE/main.json` under "mxfp8"; `make locales` finds the English ones by their calls, so
 * `t` is called with the text itself. This knows nothing of ComfyUI: `mxfp8.js` gives it what the
 * server sends.
 */

let find = () => undefined;

/** Set what finds the translation of an English text, undefined if there is none. */
export function translateWith(lookup) {
  find = lookup;
}

/**
 * @param {string} english
 * @param {object} values of the names in brackets, as in "[count] bars": numbers, texts, which are
 *     translated too if they can be, and {text, values} of such a text
 */
export function t(english, values = {}) {
  return (find(english) ?? english).replace(/\[(\w+)\]/g, (whole, name) => {
    const value = values[name] ?? whole;
    if (typeof value === "object") return t(value.text, value.values);
    return typeof value === "string" ? find(value) ?? value : value;
  });
}
