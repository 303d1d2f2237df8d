// Small helpers of the page. Text goes in as text, never as markup: names come from outside.

export const byId = (id) => document.getElementById(id);

/** An element with a class and a text. */
export function el(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

/** An SVG element with attributes. */
export function svg(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Set a text only where it differs: an untouched node costs no layout. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** The part of an id of ours that tells it from others; any other name whole. */
export const short = (id) => (/^req-[0-9a-f]{16}$/.test(id) ? id.slice(4, 12) : id);

export const count = (n) => Math.round(n).toLocaleString("en-US");

/** A size in the unit that leaves up to three digits before the point. */
export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0, value = bytes;
  for (; value >= 1000 && i < units.length - 1; i++) value /= 1024;
  return `${i === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[i]}`;
}

/** Milliseconds with three digits or so that matter; a dash where there is no value. */
export function millis(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)} ms`;
}

/** One entry of a legend: a swatch that CSS colours by its class, a name, and perhaps a count. */
export function legendItem(kind, name, value) {
  const item = el("li");
  item.append(el("i", `swatch ${kind}`), el("span", "", name));
  if (value) item.append(value);
  return item;
}

/** The value of a colour variable of the style sheet. */
export const colour = (name) => getComputedStyle(document.body).getPropertyValue(`--${name}`).trim();
