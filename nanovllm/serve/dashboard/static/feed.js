// The stream of the server's state. Knows nothing of what is drawn.
//
// It is read by fetch and not by EventSource, which could not send a key. The key lives in
// sessionStorage, so it ends with the tab, and goes into a header, so it is in no address and no log.

const PATH = "/dashboard/events";
const KEY = "nanovllm-key";
const SILENCE_MS = 60000; // with nothing at all, not even a comment: the connection is gone
const HIDDEN_MS = 30000; // a tab that nobody sees lets the engine be
const RETRIES_S = [1, 2, 4, 8];

export class Feed {
  /** `onMessage(message)` for each event, `onLink(link, text)` with open, closed, retrying, key or hidden. */
  constructor(onMessage, onLink) {
    this.onMessage = onMessage;
    this.onLink = onLink;
    this.failures = 0;
    this.run = 0; // the stream that counts; an older one's late end changes nothing
    document.addEventListener("visibilitychange", () => this.seen());
  }

  start() {
    this.stop();
    this.read(++this.run);
  }

  stop() {
    clearTimeout(this.timer);
    clearTimeout(this.watchdog);
    this.abort?.abort();
    this.run++;
  }

  /** Use another key; null forgets it. */
  useKey(key) {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
    this.failures = 0;
    this.start();
  }

  seen() {
    clearTimeout(this.hiding);
    if (document.hidden) {
      this.hiding = setTimeout(() => { this.stop(); this.isHidden = true; this.onLink("hidden", ""); }, HIDDEN_MS);
    } else if (this.isHidden) {
      this.isHidden = false;
      this.start();
    }
  }

  async read(run) {
    const key = sessionStorage.getItem(KEY);
    this.abort = new AbortController();
    try {
      const answer = await fetch(PATH, {
        headers: key ? { Authorization: `Bearer ${key}` } : {},
        signal: this.abort.signal,
        cache: "no-store",
      });
      if (run !== this.run) return;
      if (answer.status === 401 || answer.status === 403) return await this.refused(answer, key);
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      this.failures = 0;
      this.onLink("open", "");
      await this.events(answer.body.getReader(), run);
      this.retry(run, "The server closed the stream.");
    } catch (error) {
      this.retry(run, error instanceof TypeError || error.name === "AbortError" ? "The server does not answer." : error.message);
    }
  }

  async refused(answer, key) {
    const text = key || answer.status === 403 ? (await answer.json()).error.message : "";
    sessionStorage.removeItem(KEY);
    this.onLink("key", text);
  }

  retry(run, why) {
    if (run !== this.run) return;
    const seconds = RETRIES_S[Math.min(this.failures++, RETRIES_S.length - 1)];
    this.onLink("retrying", `${why} Trying again in ${seconds} s.`);
    clearTimeout(this.watchdog);
    this.timer = setTimeout(() => this.start(), seconds * 1000);
  }

  async events(reader, run) {
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      clearTimeout(this.watchdog);
      this.watchdog = setTimeout(() => this.abort.abort(), SILENCE_MS);
      const { done, value } = await reader.read();
      if (done || run !== this.run) return;
      const frames = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        if (frame.startsWith("data: ")) this.onMessage(JSON.parse(frame.slice(6)));
      }
    }
  }
}
