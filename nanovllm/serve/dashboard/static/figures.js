// The strip of figures: what is live, what is held, how fast it goes.

import { byId, count, el, say, svg } from "./dom.js";

const FIGURES = [
  { key: "live", name: "live requests", history: "live",
    value: (s) => s.running + s.loading, note: (s) => `hold blocks; ${count(s.waiting)} more wait` },
  { key: "used", name: "blocks used", history: "used",
    value: (s) => s.num_blocks - s.free_blocks, note: (s) => `${percent(s.num_blocks - s.free_blocks, s.num_blocks)} of ${count(s.num_blocks)}` },
  { key: "cached", name: "blocks cached", value: (s) => s.cached_blocks, note: () => "free, still findable" },
  { key: "free", name: "blocks free", value: (s) => s.free_blocks - s.cached_blocks, note: () => "hold nothing" },
  { key: "decode", name: "decode tokens/s", history: "decodeRate", value: (s, h) => h.decodeRate, note: (s, h, label) => `${label}, last 2 s` },
  { key: "prefill", name: "prefill tokens/s", history: "prefillRate", value: (s, h) => h.prefillRate, note: (s, h, label) => `${label}, last 2 s` },
  { key: "preemptions", name: "preemptions", value: (s) => s.preemptions, note: () => "since the start" },
];

const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "–");

export class Figures {
  constructor() {
    this.nodes = FIGURES.map((figure) => {
      const box = el("div", "figure");
      box.id = `figure-${figure.key}`;
      const line = figure.history ? svg("polyline") : null;
      const spark = line ? svg("svg", { viewBox: "0 0 120 24", preserveAspectRatio: "none", "aria-hidden": "true" }) : null;
      spark?.append(line);
      const [name, value, note] = [el("span", "name", figure.name), el("strong", "", "–"), el("span", "note muted", " ")];
      box.append(name, value, note, ...(spark ? [spark] : []));
      byId("figures").append(box);
      return { value, note, line };
    });
  }

  draw(model) {
    const point = model.history.at(-1);
    FIGURES.forEach((figure, i) => {
      const { value, note, line } = this.nodes[i];
      say(value, count(figure.value(model.stats, point)));
      say(note, figure.note(model.stats, point, model.engine.label));
      if (line) line.setAttribute("points", points(model.history.map((past) => past[figure.history])));
    });
  }

  clear() {
    for (const { value, note, line } of this.nodes) {
      say(value, "–");
      say(note, " ");
      line?.setAttribute("points", "");
    }
  }
}

/** A polyline over 120 x 24: the newest value at the right, 0 at the bottom. */
function points(values) {
  if (values.length < 4) return ""; // too few for a line
  const most = Math.max(1, ...values);
  return values.map((value, i) => `${120 - (values.length - 1 - i)},${(23 - (22 * value) / most).toFixed(1)}`).join(" ");
}
