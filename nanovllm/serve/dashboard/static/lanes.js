// Requests as lanes: from arrival to now, each stage a stretch of one axis of time.

import { byId, count, el, legendItem, millis, say, short } from "./dom.js";

const STAGES = [
  ["intake", "intake"], ["queue", "queue"], ["loading", "load"], ["schedule", "schedule"], ["prefill", "prefill"],
  ["return", "return"], ["decode", "decode"], ["preempted", "preempted"],
];
const WINDOWS_S = [5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1800, 3600];
const ROOMY_PX = 15; // below this height a lane is written small
const FEW = 40; // lanes to show where ended requests fill the place
const TICKS = 5;

export class Lanes {
  /** `onPick(id)` when a lane is clicked; `hueOf(id)` its colour on the map. */
  constructor(onPick, hueOf) {
    this.rows = new Map();
    this.onPick = onPick;
    this.hueOf = hueOf;
    for (const [kind, name] of STAGES) byId("lanes-legend").append(legendItem(kind, name));
    this.empty = el("div", "empty");
  }

  draw(model, picked) {
    const shown = this.choose(model);
    this.axis();
    const body = byId("lanes-body");
    body.classList.toggle("dense", shown.length * ROOMY_PX > body.clientHeight);
    const wanted = new Set(shown.map((one) => one.id));
    for (const [id, row] of this.rows) if (!wanted.has(id)) { row.lane.remove(); this.rows.delete(id); }
    shown.forEach((one, i) => this.place(one, i, model, picked));
    const hidden = model.total - model.requests.size;
    const ended = shown.length - model.requests.size;
    const parts = [`${count(model.total)} under way`, hidden > 0 && `${count(hidden)} of them not shown`, ended > 0 && `${count(ended)} ended`];
    say(byId("lanes-facts"), parts.filter(Boolean).join(", "));
    this.tellEmpty(model, shown.length === 0);
  }

  /** Every live request, and ended ones that are still on the axis, by arrival. Sets the axis. */
  choose(model) {
    const live = [...model.requests.values()];
    const oldest = Math.min(model.now, ...live.map((one) => one.arrival_ms));
    const recent = model.ended.filter((one) => !model.requests.has(one.id)).slice(-Math.max(0, FEW - live.length) || model.ended.length);
    const fits = live.length < FEW ? recent : [];
    const needed = (model.now - oldest) / 1000;
    this.span = (WINDOWS_S.find((seconds) => seconds >= needed) ?? needed) * 1000;
    this.start = model.now - this.span;
    const ended = fits.filter((one) => one.arrival_ms + (one.end_to_end_ms ?? 0) > this.start);
    return [...live, ...ended].sort((a, b) => a.arrival_ms - b.arrival_ms);
  }

  axis() {
    const axis = byId("axis");
    if (axis.children.length === 0) for (let i = 0; i <= TICKS; i++) axis.append(el("span"));
    [...axis.children].forEach((tick, i) => {
      const ago = (this.span / 1000) * (1 - i / TICKS);
      say(tick, ago === 0 ? "now" : `−${ago >= 120 ? `${(ago / 60).toFixed(ago % 60 ? 1 : 0)} min` : `${Number(ago.toFixed(1))} s`}`);
      tick.style.left = `${(100 * i) / TICKS}%`;
    });
  }

  place(one, i, model, picked) {
    const row = this.rows.get(one.id) ?? this.make(one.id);
    const body = byId("lanes-body");
    if (body.children[i] !== row.lane) body.insertBefore(row.lane, body.children[i] ?? null);
    const isEnded = !("stage" in one);
    row.lane.className = `lane${isEnded ? " ended" : ""}${one.id === picked ? " picked" : ""}`;
    row.lane.setAttribute("aria-pressed", String(one.id === picked));
    row.chip.className = `chip ${this.hueOf(one.id)}`;
    say(row.stage, isEnded ? one.reason : one.stage);
    say(row.tokens, `${count(one.prompt_tokens)} + ${count(one.output_tokens)}`);
    row.lane.title = this.title(one);
    this.stretches(row, this.parts(one, model.now));
  }

  make(id) {
    const row = { lane: el("button", "lane"), chip: el("i", "chip"), name: el("span", "id", short(id)), stage: el("span", "stage"),
      track: el("span", "track"), tokens: el("span", "tokens") };
    row.lane.type = "button";
    row.lane.append(row.chip, row.name, row.stage, row.track, row.tokens);
    row.lane.addEventListener("click", () => this.onPick(id));
    this.rows.set(id, row);
    return row;
  }

  title(one) {
    const ttft = one.terms.ttft == null ? "no token yet" : `TTFT ${millis(one.terms.ttft)}`;
    return `${one.id}\n${one.prompt_tokens} prompt tokens, ${one.cached_tokens} of them found; ${one.output_tokens} generated; ${ttft}`;
  }

  /** [kind, from, to] in ms of the engine's clock. A term that is not there yet reaches to now. */
  parts(one, now) {
    const t = one.terms, parts = [], end = one.end_to_end_ms == null ? now : one.arrival_ms + one.end_to_end_ms;
    let at = one.arrival_ms;
    const until = (kind, length) => {
      const to = length == null ? end : Math.min(end, at + length);
      parts.push([kind, at, to]);
      at = to;
      return length != null;
    };
    if (!until("intake", t.intake)) return parts;
    if (one.stage === "loading") { parts.push(["loading", at, end]); return parts; }
    const waited = t.queue == null ? null : t.queue - t.intake - t.state;
    const isOpen = until("queue", waited) && (!t.state || until("loading", t.state)) && until("schedule", t.schedule)
      && until("prefill", t.prefill) && until("return", t.return);
    if (isOpen) parts.push(["decode", at, end]);
    for (const [from, to] of one.waits) parts.push(["preempted", from, to ?? end]);
    return parts;
  }

  stretches(row, parts) {
    while (row.track.children.length > parts.length) row.track.lastChild.remove();
    parts.forEach(([kind, from, to], i) => {
      const bar = row.track.children[i] ?? row.track.appendChild(el("i"));
      const left = Math.max(0, (from - this.start) / this.span), right = Math.max(0, (to - this.start) / this.span);
      bar.className = kind;
      bar.style.left = `${(100 * left).toFixed(2)}%`;
      bar.style.width = `${(100 * (right - left)).toFixed(2)}%`;
    });
  }

  tellEmpty(model, isEmpty) {
    if (!isEmpty) return this.empty.remove();
    if (this.empty.isConnected) return;
    const body = { model: model.engine.model, messages: [{ role: "user", content: "Hello" }] };
    const command = `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
    this.empty.replaceChildren(el("p", "", "No requests yet. Send one:"), el("pre", "", command));
    byId("lanes-body").append(this.empty);
  }

  clear() {
    for (const { lane } of this.rows.values()) lane.remove();
    this.rows.clear();
    this.empty.remove();
    say(byId("lanes-facts"), "");
  }
}
