// What lies in each tier, by kind, against its quota; what was found there, what failed; the last receipts.

import { byId, count, el, legendItem, millis, say, size } from "./dom.js";

const KINDS = ["kv", "knowledge", "session", "meta"];
const COUNTS = ["hits", "misses", "corrupt", "failures"];
const BAD = new Set(["corrupt", "failures"]);
const BREAKERS = { open: "left alone", half_open: "tried again" };

export class Tiers {
  constructor() {
    for (const kind of KINDS) byId("tiers-legend").append(legendItem(kind, kind));
    byId("tiers-legend").append(legendItem("cached", "kv, free"));
  }

  draw(model) {
    const { stats, engine } = model;
    const drawn = JSON.stringify([stats.tiers, stats.num_blocks - stats.free_blocks, stats.cached_blocks]);
    if (drawn !== this.drawn) {
      this.drawn = drawn;
      byId("tiers-body").replaceChildren(...device(stats, engine), ...Object.entries(stats.tiers).flatMap(([name, tier]) => rows(name, tier)));
    }
    say(byId("tiers-facts"), loads(stats.state));
    const newest = model.receipts.at(-1)?.seq ?? 0;
    if (newest === this.newest && engine === this.engine) return;
    [this.newest, this.engine] = [newest, engine];
    const list = model.receipts.map(receipt).reverse();
    byId("receipts").replaceChildren(...(list.length ? list : [el("li", "empty", "Nothing was put, moved or let go yet.")]));
  }

  clear() {
    [this.drawn, this.newest, this.engine] = [null, null, null];
    for (const id of ["tiers-body", "receipts"]) byId(id).replaceChildren();
    say(byId("tiers-facts"), "");
  }
}

/** The block pool, which keeps no count of its own: its hits are in the requests. */
function device(stats, engine) {
  const used = (stats.num_blocks - stats.free_blocks) * engine.block_bytes, cached = stats.cached_blocks * engine.block_bytes;
  const quota = stats.num_blocks * engine.block_bytes;
  return [row("tier", "device", used + cached, {}), bar([["kv", used], ["cached", cached]], used + cached, quota, "The block pool; what is found there is told by each request.")];
}

/** A tier: its sums, its bar, and each kind that has been there. */
function rows(name, tier) {
  const kinds = KINDS.filter((kind) => tier.by_kind[kind] || tier.kinds[kind]);
  const used = tier.quota_bytes === null ? kinds.reduce((sum, kind) => sum + (tier.by_kind[kind] ?? 0), 0) : tier.used_bytes;
  const speed = tier.read_speed_label === "measured" ? `read at ${size(tier.read_bytes_per_ms * 1000)}/s, measured` : "not read yet";
  return [
    row("tier", name, used, tier),
    bar(kinds.map((kind) => [kind, tier.by_kind[kind] ?? 0]), used, tier.quota_bytes, `${count(tier.entries)} pieces; ${speed}`),
    ...Object.entries(tier.breaker).filter(([, state]) => state !== "closed").map(([direction, state]) => alarm(`${direction} ${BREAKERS[state]}`)),
    ...kinds.map((kind) => row("of-kind", kind, tier.by_kind[kind] ?? 0, tier.kinds[kind] ?? {})),
  ];
}

/** A breaker that is not closed, in words. */
function alarm(text) {
  const line = el("tr", "bar"), cell = el("td", "alarm", text);
  cell.colSpan = 2 + COUNTS.length;
  line.append(cell);
  return line;
}

function row(kind, name, bytes, counts) {
  const line = el("tr", kind);
  const head = el("th", kind === "tier" ? "" : "depth-1", name);
  head.scope = "row";
  line.append(head, el("td", "", size(bytes)));
  for (const key of COUNTS) {
    const value = counts[key];
    line.append(el("td", value && BAD.has(key) ? "tally-bad" : "", value === undefined ? "–" : count(value)));
  }
  return line;
}

/** Stretches of the quota by kind, or of what is there where the tier has no quota of ours. */
function bar(parts, used, quota, text) {
  const line = el("tr", "bar"), cell = el("td"), flex = el("div"), gauge = el("span", "gauge");
  cell.colSpan = 2 + COUNTS.length;
  for (const [kind, bytes] of parts) {
    if (!bytes) continue;
    const stretch = el("i", kind);
    stretch.style.width = `${(100 * bytes) / (quota || used)}%`;
    gauge.append(stretch);
  }
  const share = quota ? `${((100 * used) / quota).toFixed(used && used < quota / 100 ? 1 : 0)} % of ${size(quota)}` : "known here; shared";
  line.title = text;
  flex.append(gauge, el("span", "note muted", share));
  cell.append(flex);
  line.append(cell);
  return line;
}

function loads(state) {
  if (state.loads === undefined) return "";
  const parts = [`${count(state.loads)} loads`, state.loads_failed && `${count(state.loads_failed)} of them failed`,
    state.loads_refused && `${count(state.loads_refused)} not worth it`, `${count(state.spilled_blocks)} blocks written`,
    state.spills_waiting && `${count(state.spills_waiting)} wait`, state.spills_dropped && `${count(state.spills_dropped)} dropped`];
  return parts.filter(Boolean).join(", ");
}

function receipt(one) {
  const line = el("li"), at = new Date(one.ts_ms);
  const bytes = el("span", "muted", one.size_bytes ? size(one.size_bytes) : "");
  line.title = [one.state_id, millis(one.ms)].filter(Boolean).join(", ");
  line.append(el("time", "muted", `${at.toTimeString().slice(0, 8)}.${String(at.getMilliseconds()).padStart(3, "0")}`));
  line.append(el("i", `swatch ${one.ok ? "decode" : "bad"}`), el("span", "what", one.tier ? `${one.action}, ${one.tier}` : one.action), bytes);
  line.append(el("span", "detail muted", one.reason));
  return line;
}
