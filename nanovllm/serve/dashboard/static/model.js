// What is known of the engine: a snapshot with every later increment applied. Draws nothing.

const ENDED = 64, EVENTS = 500, RECEIPTS = 40, HISTORY = 120;
const RATE_MS = 2000; // rates are means over about this long

export const TERMS = ["queue", "schedule", "prefill", "return"]; // they add up to the TTFT

export class Model {
  constructor() {
    this.forget();
  }

  forget() {
    this.engine = null;
    this.stats = {};
    this.now = 0; // the engine's clock, ms
    this.requests = new Map();
    this.cached = new Set();
    this.held = new Set();
    this.ended = [];
    this.events = [];
    this.receipts = [];
    this.lost = 0;
    this.history = []; // {now, running, used, decode, prefill}
  }

  /** Take in a message of the feed. */
  take(message) {
    if (message.type === "snapshot") this.snapshot(message);
    else if (this.engine) this.increment(message);
    else return;
    this.now = message.ts_ms;
    this.stats = message.stats;
    this.total = message.num_requests;
    this.remember();
    this.own();
  }

  snapshot(message) {
    const history = this.engine && message.ts_ms >= this.now ? this.history : [];
    this.forget();
    this.history = history;
    this.engine = message.engine;
    this.wallOffset = Date.now() - message.ts_ms;
    for (const one of message.requests) this.requests.set(one.id, one);
    this.cached = new Set(message.cached);
    this.held = new Set(message.held);
    this.ended = message.ended;
    this.events = message.events;
    this.receipts = message.receipts;
    this.lost = message.events_lost;
  }

  increment(message) {
    for (const id of message.gone) this.requests.delete(id);
    for (const one of message.requests) {
      const before = this.requests.get(one.id);
      if (!one.block_ids) one.block_ids = before?.block_ids ?? [];
      this.requests.set(one.id, one);
    }
    change(this.cached, message.cached);
    change(this.held, message.held);
    this.ended = [...this.ended, ...message.ended].slice(-ENDED);
    this.events = [...this.events, ...message.events].slice(-EVENTS);
    this.receipts = [...this.receipts, ...message.receipts].slice(-RECEIPTS);
    this.lost += message.events_lost;
  }

  remember() {
    const s = this.stats;
    const last = this.history.at(-1);
    if (last && s.decode_tokens < last.decode) this.history = []; // another engine counts from 0
    this.history.push({
      now: this.now, live: s.running + s.loading, used: s.num_blocks - s.free_blocks,
      decode: s.decode_tokens, prefill: s.prefill_tokens,
      decodeRate: this.rate("decode", s.decode_tokens), prefillRate: this.rate("prefill", s.prefill_tokens),
    });
    if (this.history.length > HISTORY) this.history.shift();
  }

  /** Tokens a second over the last RATE_MS. */
  rate(name, value) {
    const since = this.history.findLast((point) => point.now <= this.now - RATE_MS) ?? this.history[0];
    return since && this.now > since.now ? ((value - since[name]) / (this.now - since.now)) * 1000 : 0;
  }

  /** Who holds each block: `owner[i]` is its first holder's id, `holders[i]` how many block tables have it. */
  own() {
    const size = this.stats.num_blocks;
    this.owner = new Array(size).fill(null);
    this.holders = new Uint16Array(size);
    for (const one of this.requests.values()) {
      for (const id of one.block_ids) {
        if (this.owner[id] === null) this.owner[id] = one.id;
        this.holders[id]++;
      }
    }
  }

  /** The state of block `i`: shared, the stage of its owner, held, cached or free. */
  blockState(i) {
    if (this.holders[i] > 1) return "shared";
    if (this.holders[i] === 1) return this.requests.get(this.owner[i]).stage;
    return this.held.has(i) ? "held" : this.cached.has(i) ? "cached" : "free";
  }

  /** Live and recently ended requests whose time to first token is known, oldest first. */
  withFirstToken() {
    const live = [...this.requests.values()];
    const at = (one) => one.arrival_ms + one.terms.ttft;
    return [...this.ended, ...live].filter((one) => one.terms.ttft != null).sort((a, b) => at(a) - at(b)).slice(-ENDED);
  }

  find(id) {
    return this.requests.get(id) ?? this.ended.findLast((one) => one.id === id);
  }
}

function change(set, { add, drop }) {
  for (const id of drop) set.delete(id);
  for (const id of add) set.add(id);
}
