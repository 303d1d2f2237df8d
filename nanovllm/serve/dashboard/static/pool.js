// The map of the pool: one cell a block, or a few blocks where there are too many to see.

import { byId, colour, count, el, legendItem, say } from "./dom.js";

const STATES = [
  ["prefill", "prefilling"], ["decode", "decoding"], ["shared", "shared"], ["loading", "loading"],
  ["held", "pinned or moving"], ["cached", "cached"], ["free", "free"],
];
const ALWAYS = ["prefill", "decode", "shared", "cached", "free"];
const OWNER_HUES = 12;
const LEAST_PX = 4, MOST_PX = 20;

export class Pool {
  /** `onPick(id or null)` when a block, and so its owner, is clicked. */
  constructor(onPick) {
    this.canvas = byId("blocks");
    this.mode = "state";
    this.hues = new Map(); // owner -> number of its hue
    this.arrivals = 0;
    this.legend = STATES.map(([kind, name]) => {
      const value = el("b");
      const item = legendItem(kind, name, value);
      item.hidden = !ALWAYS.includes(kind);
      byId("pool-legend").append(item);
      return { kind, item, value };
    });
    for (const mode of ["state", "owner"]) byId(`by-${mode}`).addEventListener("click", () => this.setMode(mode));
    new ResizeObserver(() => this.redraw()).observe(byId("map"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    this.canvas.addEventListener("mousemove", (event) => { this.pointed = this.blockAt(event); this.tell(); });
    this.canvas.addEventListener("mouseleave", () => { this.pointed = null; this.tell(); });
    this.canvas.addEventListener("click", (event) => onPick(this.model?.owner[this.blockAt(event)] ?? null));
  }

  setMode(mode) {
    this.mode = mode;
    for (const name of ["state", "owner"]) byId(`by-${name}`).setAttribute("aria-pressed", String(name === mode));
    document.body.classList.toggle("by-owner", mode === "owner");
    this.redraw();
  }

  draw(model, picked) {
    this.model = model;
    this.picked = picked;
    for (const id of this.hues.keys()) if (!model.requests.has(id)) this.hues.delete(id);
    for (const id of model.requests.keys()) if (!this.hues.has(id)) this.hues.set(id, this.arrivals++ % OWNER_HUES);
    this.redraw();
  }

  /** The hue of an owner as a class name. */
  hueOf(id) {
    return this.hues.has(id) ? `hue-${this.hues.get(id)}` : "";
  }

  redraw() {
    const model = this.model;
    if (!model?.engine) return;
    const size = model.stats.num_blocks;
    const states = Array.from({ length: size }, (_, i) => model.blockState(i));
    this.layOut(size);
    this.paint(states);
    this.count(states);
    this.tell();
  }

  /** Cells as large as the frame allows; below LEAST_PX several blocks share one. */
  layOut(size) {
    const frame = byId("map").getBoundingClientRect();
    const [width, height] = [Math.max(40, frame.width), Math.max(40, frame.height)];
    const most = Math.floor(width / LEAST_PX) * Math.floor(height / LEAST_PX);
    this.group = Math.max(1, Math.ceil(size / most));
    this.cells = Math.ceil(size / this.group);
    let cell = MOST_PX;
    while (cell > LEAST_PX && Math.floor(width / cell) * Math.floor(height / cell) < this.cells) cell--;
    this.cell = cell;
    this.canvas.dataset.cell = cell;
    this.columns = Math.floor(width / cell);
    const ratio = window.devicePixelRatio || 1;
    const wanted = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== wanted[0] || this.canvas.height !== wanted[1]) [this.canvas.width, this.canvas.height] = wanted;
    this.context = this.canvas.getContext("2d");
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.context.clearRect(0, 0, width, height);
  }

  paint(states) {
    const palette = new Map(), context = this.context;
    const of = (name) => palette.get(name) ?? palette.set(name, colour(name)).get(name);
    const held = this.model.requests.get(this.picked)?.block_ids ?? [];
    const mine = held.length ? new Set(held) : null; // of the picked request: the others step back
    const inner = this.cell - (this.cell > 5 ? 2 : 1);
    for (let cell = 0; cell < this.cells; cell++) {
      const [x, y] = [(cell % this.columns) * this.cell, Math.floor(cell / this.columns) * this.cell];
      const block = this.telling(cell, states);
      context.globalAlpha = mine && !mine.has(block) ? 0.25 : 1;
      context.fillStyle = of(this.colourOf(block, states[block]));
      context.fillRect(x, y, inner, inner);
      if (states[block] === "shared" && this.mode === "owner" && inner >= 6) {
        context.fillStyle = of("panel");
        context.fillRect(x + inner / 2 - 1.5, y + inner / 2 - 1.5, 3, 3);
      }
    }
    context.globalAlpha = 1;
  }

  colourOf(block, state) {
    if (this.mode === "owner" && this.model.owner[block] !== null) return this.hueOf(this.model.owner[block]);
    return state === "queued" || state === "preempted" ? "prefill" : state;
  }

  /** Of a cell's blocks, the one it shows: a used one before a held one, a cached one, a free one. */
  telling(cell, states) {
    const first = cell * this.group;
    if (this.group === 1) return first;
    const rank = (i) => ({ free: 3, cached: 2, held: 1 })[states[i]] ?? 0;
    let best = first;
    for (let i = first + 1; i < Math.min(first + this.group, states.length); i++) if (rank(i) < rank(best)) best = i;
    return best;
  }

  count(states) {
    const counts = {};
    for (const state of states) counts[state] = (counts[state] ?? 0) + 1;
    for (const { kind, item, value } of this.legend) {
      say(value, count(counts[kind] ?? 0));
      item.hidden = !counts[kind] && !ALWAYS.includes(kind);
    }
    const engine = this.model.engine;
    const grouped = this.group > 1 ? `; a cell is ${this.group} blocks` : "";
    say(byId("pool-facts"), `${count(states.length)} blocks of ${engine.block_size} tokens${grouped}`);
    this.canvas.setAttribute("aria-label", `Map of the KV pool: ${this.legend.map(({ kind }) => `${counts[kind] ?? 0} ${kind}`).join(", ")}`);
  }

  blockAt(event) {
    if (!this.model?.engine) return null;
    const frame = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - frame.left) / this.cell);
    const cell = Math.floor((event.clientY - frame.top) / this.cell) * this.columns + column;
    return column < this.columns && cell >= 0 && cell < this.cells ? cell * this.group : null;
  }

  /** What the pointer is on, in words. */
  tell() {
    const model = this.model, i = this.pointed;
    const hint = this.mode === "owner" ? `a colour is an owner (${OWNER_HUES} colours, in turn); a dot is a shared block` : "point at a block to see its owner";
    if (i == null || !model?.owner || i >= model.owner.length) return say(byId("block"), hint);
    const last = Math.min(i + this.group, model.owner.length) - 1;
    const who = model.owner[i] === null ? "" : `, of ${model.owner[i]}`;
    const shared = model.holders[i] > 1 ? `, in ${model.holders[i]} block tables` : "";
    say(byId("block"), `block ${i}${last > i ? `–${last}` : ""}: ${model.blockState(i)}${who}${shared}`);
  }

  clear() {
    this.model = null;
    this.context?.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (const { value } of this.legend) say(value, "");
    say(byId("pool-facts"), "");
    say(byId("block"), "");
  }
}
