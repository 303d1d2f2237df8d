// The newest events, newest first, by request if so wished.

import { byId, count, el, millis, say, short, size } from "./dom.js";

const SHOWN = 200;
const KINDS = {
  entered: "intake", queued: "queue", loading: "loading", scheduled: "schedule", prefill_begin: "prefill", prefill_chunk: "prefill",
  prefill_end: "prefill", first_token: "decode", first_handover: "return", output_complete: "decode", state_released: "free",
  preempted: "preempted", aborted: "bad", failed: "bad", rejected: "bad",
};
const REASONS = {
  blocks: "blocks are short", headroom: "room is kept for growth", batch_cap: "the batch is full", token_budget: "the step's token budget is spent",
  new_requests_cap: "enough new requests this step", policy: "the policy holds it back", producer: "its prefix is being computed", preempted: "it gave way",
};

export class Events {
  constructor() {
    this.filter = byId("filter");
    this.filter.addEventListener("input", () => this.redraw());
  }

  /** Show one request's events only; "" for all. */
  narrow(id) {
    this.filter.value = id;
    this.redraw();
  }

  draw(model) {
    this.model = model;
    const newest = model.events.at(-1)?.seq;
    if (newest !== this.newest || model.engine !== this.engine) this.redraw();
  }

  redraw() {
    const model = this.model;
    if (!model?.engine) return;
    const words = this.filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const lines = model.events.map(lineOf).filter((line) => words.every((word) => line.text.includes(word)));
    const rows = lines.slice(-SHOWN).reverse().map((line) => this.row(line));
    if (rows.length === 0) rows.push(el("li", "empty", words.length ? "No event fits the filter." : "Nothing has happened yet."));
    byId("events-body").replaceChildren(...rows);
    [this.newest, this.engine] = [model.events.at(-1)?.seq, model.engine];
    const lost = model.lost ? `; ${count(model.lost)} more were too fast to show` : "";
    say(byId("events-facts"), `newest ${count(Math.min(lines.length, SHOWN))}${lost}; decode steps left out`);
  }

  row({ event, what, detail, kind }) {
    const row = el("li");
    const name = el("span", "id", short(event.request_id));
    name.title = event.request_id;
    row.append(el("time", "muted", this.clock(event.ts_ns)), el("i", `swatch ${kind}`), el("span", "what", what), name, el("span", "detail muted", detail));
    return row;
  }

  clock(ns) {
    const at = new Date(this.model.wallOffset + ns / 1e6);
    return `${at.toTimeString().slice(0, 8)}.${String(at.getMilliseconds()).padStart(3, "0")}`;
  }

  clear() {
    this.model = null;
    byId("events-body").replaceChildren();
    say(byId("events-facts"), "");
  }
}

function lineOf(event) {
  if (event.record === "move") return moveLine(event);
  const isWait = event.record === "wait";
  const what = isWait ? "waits" : event.stage;
  const detail = isWait ? waitDetail(event) : stageDetail(event);
  const kind = isWait ? "queue" : (KINDS[event.stage] ?? "free");
  return { event, what, detail, kind, text: `${event.request_id} ${what} ${detail} ${event.reason ?? ""}`.toLowerCase() };
}

/** KV that moved between the device and a tier, or a tier that failed. */
function moveLine(event) {
  const what = event.move === "failure" ? `${event.tier} failed` : `${event.move}, ${event.tier}`;
  const kinds = event.kinds ? ` (${event.kinds})` : "";
  const moved = `${count(event.blocks)} blocks, ${size(event.size_bytes)} in ${millis(event.duration_ns / 1e6)}`;
  const words = { refused: "computing is cheaper", failed: "nothing came", partial: `${moved}; not all came`, done: moved, open: "it is left alone", half_open: "it is tried again", closed: "it stays in use" };
  const kind = event.move === "failure" || event.outcome === "failed" ? "bad" : "loading";
  const detail = (words[event.outcome] ?? event.outcome) + kinds;
  return { event, what, detail, kind, text: `${event.request_id} ${what} ${detail} ${event.outcome}`.toLowerCase() };
}

function waitDetail(event) {
  const need = event.need_blocks ? `: needs ${event.need_blocks}, ${event.free_blocks} free` : "";
  return `${REASONS[event.reason] ?? event.reason}${need}${event.behind ? `, for ${short(event.behind)}` : ""}`;
}

function stageDetail(event) {
  const parts = [];
  if (event.tokens) parts.push(`${event.tokens} tokens`);
  else if (event.stage === "queued") parts.push(`${event.prompt_len} prompt tokens`);
  else if (event.stage === "output_complete") parts.push(`${event.generated_len} generated`);
  if (event.batch_size > 1) parts.push(`batch of ${event.batch_size}`);
  if (event.sample) parts.push(`sample ${event.sample}`);
  if (event.epoch) parts.push(`preempted ${event.epoch}x`);
  return parts.join(", ");
}
