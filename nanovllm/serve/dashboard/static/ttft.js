// The time to first token, taken apart: a column a request, and the terms in figures.

import { byId, count, el, millis, say, svg } from "./dom.js";
import { TERMS } from "./model.js";

const ROWS = [
  ["ttft", "TTFT", 0], ["queue", "T_queue", 1], ["intake", "T_intake", 2], ["state", "T_state", 2],
  ["schedule", "T_schedule", 1], ["prefill", "T_prefill", 1], ["return", "T_return", 1],
];
const COLUMNS = ["mean", "P50", "P99", "picked"];
const COLUMNS_SHOWN = 64, HEIGHT = 100;

export class Ttft {
  constructor(onPick) {
    this.onPick = onPick;
    const body = byId("ttft-body");
    this.chart = svg("svg", { viewBox: `0 0 ${COLUMNS_SHOWN} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": "TTFT of recent requests, one column each" });
    this.scale = el("span", "scale muted");
    const frame = el("div", "chart");
    frame.append(this.scale, this.chart);
    this.cells = new Map();
    body.append(frame, this.table());
  }

  table() {
    const table = el("table");
    table.createCaption().textContent = "The means of the four terms add up to the mean TTFT; P50 and P99 do not.";
    const head = table.createTHead().insertRow();
    for (const name of ["", ...COLUMNS]) { const cell = el("th", "", name); cell.scope = "col"; head.append(cell); }
    const rows = table.createTBody();
    for (const [term, name, depth] of ROWS) {
      const row = rows.insertRow();
      const cell = el("th", `depth-${depth}`);
      cell.scope = "row";
      if (TERMS.includes(term)) cell.append(el("i", `swatch ${term}`));
      cell.append(el("span", "", name));
      row.append(cell);
      this.cells.set(term, COLUMNS.map(() => row.insertCell()));
    }
    return table;
  }

  draw(model, picked) {
    const known = model.withFirstToken();
    say(byId("ttft-label"), model.engine.label);
    say(byId("ttft-facts"), known.length ? known.length === 1 ? "of one request" : `last ${count(known.length)} requests` : "no first token yet");
    for (const [term, cells] of this.cells) this.fill(term, cells, known, model.find(picked));
    const last = known.at(-1);
    const sign = `${known.length} ${last?.id} ${last?.terms.ttft} ${picked}`;
    if (sign !== this.sign) this.columns(known, picked);
    this.sign = sign;
  }

  fill(term, cells, known, one) {
    const values = known.map((each) => each.terms[term] ?? 0).sort((a, b) => a - b);
    const mean = values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
    const shown = [mean, rank(values, 50), rank(values, 99), one?.terms[term]];
    cells.forEach((cell, i) => say(cell, millis(shown[i])));
  }

  columns(known, picked) {
    const most = Math.max(1e-9, ...known.map((one) => one.terms.ttft));
    const drawn = known.flatMap((one, i) => this.column(one, COLUMNS_SHOWN - known.length + i, most, picked));
    this.chart.replaceChildren(...drawn);
    say(this.scale, known.length ? `${millis(most)} at most` : "");
  }

  column(one, x, most, picked) {
    let y = HEIGHT;
    const group = svg("g", { class: picked && one.id !== picked ? "other" : "" });
    const title = svg("title");
    title.textContent = `${one.id}: ${millis(one.terms.ttft)}`;
    group.append(title);
    for (const term of TERMS) {
      const height = (HEIGHT * (one.terms[term] ?? 0)) / most;
      y -= height;
      group.append(svg("rect", { class: term, x: x + 0.1, y: y.toFixed(2), width: 0.8, height: height.toFixed(2) }));
    }
    group.addEventListener("click", () => this.onPick(one.id));
    return [group];
  }

  clear() {
    this.sign = null;
    this.chart.replaceChildren();
    say(this.scale, "");
    say(byId("ttft-facts"), "");
    for (const cells of this.cells.values()) for (const cell of cells) say(cell, "");
  }
}

/** The smallest value that `percent` of a hundred do not exceed: one that occurred. */
function rank(values, percent) {
  return values.length ? values[Math.max(0, Math.ceil((percent * values.length) / 100) - 1)] : null;
}
