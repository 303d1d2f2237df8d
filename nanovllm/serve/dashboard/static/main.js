// The page: one model, six views of it, and what is said where there is nothing to draw.

import { byId, say } from "./dom.js";
import { Events } from "./events.js";
import { Feed } from "./feed.js";
import { Figures } from "./figures.js";
import { Lanes } from "./lanes.js";
import { Model } from "./model.js";
import { Pool } from "./pool.js";
import { Tiers } from "./tiers.js";
import { Ttft } from "./ttft.js";

const NOTICES = {
  loading: "The model is loading. The picture comes as soon as it runs.",
  draining: "The server is shutting down: no new requests are taken, running ones end.",
  hanging: "The engine has said nothing for a while. What is below is the last that is known.",
  unhealthy: "The engine has failed several times in a row and takes no more requests. Restart the server; its log says why.",
  dead: "The engine has ended. What is below is the last that is known. Restart the server; its log says why.",
};
const SHOWN = { ready: "live", retrying: "reconnecting", key: "key needed", hidden: "paused" };

const model = new Model();
let picked = null; // the request that is looked at more closely
let linkState = "connecting", engineState = "", why = "";

const pool = new Pool((id) => pick(id));
const lanes = new Lanes((id) => pick(id), (id) => pool.hueOf(id));
const figures = new Figures();
const ttft = new Ttft((id) => pick(id));
const events = new Events();
const tiers = new Tiers();
const feed = new Feed(onMessage, onLink);

function onMessage(message) {
  if (message.type === "status") {
    engineState = message.state;
    if (engineState === "loading") clear();
  } else {
    model.take(message);
    draw();
  }
  tell();
}

function onLink(link, text) {
  [linkState, why] = [link, text];
  if (link === "key") clear();
  tell();
}

function draw() {
  if (!model.engine) return;
  if (picked && !model.find(picked)) picked = null;
  pool.draw(model, picked);
  lanes.draw(model, picked);
  for (const view of [figures, events, tiers]) view.draw(model);
  ttft.draw(model, picked);
  const { engine } = model;
  say(byId("model"), engine.model);
  say(byId("facts"), [engine.dtype, engine.device, `prefix ${engine.prefix_mode}`, `context ${engine.max_model_len.toLocaleString("en-US")}`].filter(Boolean).join(" · "));
}

function clear() {
  model.forget();
  for (const view of [pool, lanes, figures, ttft, events, tiers]) view.clear();
}

/** Where things stand, in a word at the top and a sentence where it is not simply live. */
function tell() {
  const state = linkState === "open" ? engineState || "connecting" : linkState;
  document.body.dataset.state = state;
  document.body.classList.toggle("stale", Boolean(model.engine) && !["ready", "draining"].includes(state));
  document.body.classList.toggle("blank", !model.engine);
  say(byId("state"), SHOWN[state] ?? state);
  const text = state === "retrying" ? why : NOTICES[state] ?? "";
  say(byId("notice"), state === "key" && why ? why : text);
  byId("notice").hidden = byId("notice").textContent === "";
  const wasHidden = byId("key-form").hidden;
  byId("key-form").hidden = state !== "key";
  if (wasHidden && state === "key") byId("key").focus();
}

/** Look at one request; at none if it was that one. */
function pick(id) {
  picked = id === picked ? null : id;
  events.narrow(picked ?? "");
  draw();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  feed.useKey(byId("key").value.trim());
  byId("key").value = "";
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && picked) pick(picked); });
tell();
feed.start();
