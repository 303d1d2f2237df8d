"""The dashboard in a real browser: what it draws, what it asks for, and what it says when there is nothing to draw."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm.core.sampling_params import SamplingParams
from tests.serve.browser import Page, browser
from tests.serve.servers import COMPLETIONS, LiveServer, assert_at_rest, until

Factory = Callable[..., LiveServer]
HOSTILE = "<img src=x onerror=document.title='pwned'>"
BLOCKS, REQUESTS = 1000, 64
COLOURS = """(() => {
  const canvas = document.getElementById('blocks'), cell = Number(canvas.dataset.cell);
  const inner = cell - (cell > 5 ? 2 : 1);
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height), seen = {};
  for (let i = 0; i < data.length; i += 4) {
    const name = `rgb(${data[i]}, ${data[i + 1]}, ${data[i + 2]})`;
    if (data[i + 3]) seen[name] = (seen[name] ?? 0) + 1;
  }
  const of = (kind) => getComputedStyle(document.querySelector(`#pool-legend .${kind}`)).backgroundColor;
  const count = (kind) => (seen[of(kind)] ?? 0) / inner ** 2;
  return Object.fromEntries(['prefill', 'decode', 'shared', 'cached', 'free'].map((kind) => [kind, count(kind)]));
})()"""
LEGEND = """Object.fromEntries([...document.querySelectorAll('#pool-legend li')].map((item) => [
  item.querySelector('i').className.split(' ')[1], Number(item.querySelector('b').textContent.replaceAll(',', '')),
]))"""
BOXES = ".lane, .figure, #blocks, .chart, table, #events-body, #receipts, .gauge"
OUTSIDE = """[...document.querySelectorAll('BOXES')].filter((node) => {
  const own = node.getBoundingClientRect(), frame = (node.closest('.panel') ?? document.body).getBoundingClientRect();
  return own.left < frame.left - 1 || own.right > frame.right + 1 || own.width < 20;
}).map((node) => node.outerHTML.slice(0, 80))""".replace("BOXES", BOXES)
OVERLAPS = """(() => {
  const all = [...document.querySelectorAll('.panel, .figure')].map((node) => node.getBoundingClientRect());
  return all.some((a, i) => all.some((b, j) => i < j
    && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)); })()"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def big() -> Iterator[LiveServer]:
    """A pool of 1,000 blocks and room for 64 requests, with a name that is no good citizen."""
    live = LiveServer(
        engine_process=False,
        num_blocks=BLOCKS,
        max_num_seqs=REQUESTS,
        served_model_name=(HOSTILE,),
        max_tenant_requests=128,
    )
    yield live.start()
    live.stop()


@contextmanager
def busy(live: LiveServer, count: int) -> Iterator[None]:
    """`count` requests that would go on for long; aborted at the end."""
    socks = []
    for start in range(0, count, 32):
        prompts = [f"{'one prefix that all of them have '}{number}" for number in range(start, min(start + 32, count))]
        body = json.dumps({"prompt": prompts, "max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
        socks.append(live.connect())
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        socks[-1].sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    try:
        yield
    finally:
        for sock in socks:
            sock.close()
        assert_at_rest(live)


@contextmanager
def standing_still(live: LiveServer) -> Iterator[None]:
    """The engine stops between two steps, right after it has said what it holds."""
    still, go_on = threading.Event(), threading.Event()
    loop = live.services.engine.link.engine_loop

    def stop() -> None:
        loop._show()
        still.set()
        go_on.wait(20)

    loop.engine.post(stop)
    assert still.wait(20)
    try:
        yield
    finally:
        go_on.set()


def opened(page: Page, live: LiveServer, **frame: Any) -> None:
    page.requests.clear()
    page.complaints.clear()
    page.open(live.server.url, **frame)


def metric(live: LiveServer, name: str) -> float:
    lines = live.get("/metrics").body.decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"nanovllm:{name}{{")).rpartition(" ")[2])


def figure(page: Page, name: str) -> int:
    return int(page.text(f"#figure-{name} strong").replace(",", ""))


def give_key(page: Page, key: str) -> None:
    page.run(f"document.getElementById('key').value = '{key}'; document.querySelector('#key-form button').click()")


def lanes(page: Page, stage: str = "") -> int:
    script = f"[...document.querySelectorAll('.lane .stage')].filter((n) => n.textContent.startsWith('{stage}')).length"
    return page.run(script)


def test_a_full_pool_and_64_requests_are_drawn_as_metrics_counts_them(page: Page, big: LiveServer) -> None:
    opened(page, big)
    with busy(big, REQUESTS):
        until(lambda: big.services.engine.stats.running >= REQUESTS - 20, "they do not run")
        page.until("document.querySelectorAll('.lane').length === 64 && document.querySelector('.lane .decode')")
        with standing_still(big):
            used, cached = round(metric(big, "kv_cache_usage_perc") * BLOCKS), big.engine.scheduler.kv.num_cached_blocks
            page.until(f"document.querySelector('#figure-used strong').textContent === '{used}'")
            legend = page.run(LEGEND)
            assert figure(page, "live") == metric(big, "num_requests_running") + metric(big, "num_requests_waiting")
            assert lanes(page) == REQUESTS and lanes(page, "decode") > 0
            assert legend["prefill"] + legend["decode"] + legend["shared"] == used > 0 and legend["shared"] >= 1
            assert legend["cached"] == cached == figure(page, "cached")
            assert sum(legend.values()) == BLOCKS
            painted = page.run(COLOURS)
            assert painted == {kind: legend[kind] for kind in painted}
        for width, height in ((1400, 900), (900, 1200), (420, 900)):
            page.resize(width, height)
            page.until(f"innerWidth === {width}")
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run(OUTSIDE) == [] and not page.run(OVERLAPS)
    assert page.complaints == []


def test_a_request_is_followed_from_its_lane_to_its_end(page: Page, big: LiveServer) -> None:
    opened(page, big, dark=True)
    page.until("document.body.dataset.state === 'ready'")
    big.complete("the one that is looked at", max_tokens=9, ignore_eos=True, model=HOSTILE)
    page.until("[...document.querySelectorAll('.lane.ended .stage')].some((node) => node.textContent === 'length')")
    page.run("[...document.querySelectorAll('.lane')].at(-1).click()")
    request_id = page.run("document.getElementById('filter').value")
    assert request_id in page.run("document.querySelector('.lane.picked').title")
    stages = page.run("[...document.querySelectorAll('#events-body .what')].map((node) => node.textContent)")
    assert stages[::-1][:4] == ["entered", "queued", "scheduled", "prefill_begin"] and stages[0] == "state_released"
    terms = page.run("""Object.fromEntries([...document.querySelectorAll('#ttft tbody tr')].map((row) =>
      [row.cells[0].textContent, parseFloat(row.cells[4].textContent)]))""")
    parts = [terms[name] for name in ("T_queue", "T_schedule", "T_prefill", "T_return")]
    assert terms["TTFT"] == pytest.approx(sum(parts), rel=0.02, abs=0.05) and terms["T_intake"] <= terms["T_queue"]
    assert page.text("#ttft-label") == "measured"
    page.run("document.getElementById('by-owner').click()")
    assert page.run("document.getElementById('by-owner').getAttribute('aria-pressed')") == "true"
    page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.run("document.getElementById('filter').value") == ""
    assert page.complaints == []


TIERS = """Object.fromEntries([...document.querySelectorAll('#tiers-body tr:not(.bar)')].map((row) => {
  const before = [...document.querySelectorAll('#tiers-body tr')].slice(0, row.rowIndex);
  const tier = before.findLast((one) => one.className === 'tier');
  const name = row.className === 'tier' ? row.cells[0].firstChild.textContent
    : `${tier.cells[0].firstChild.textContent} ${row.cells[0].textContent}`;
  return [name, [...row.cells].slice(2).map((cell) => cell.textContent)];
}))"""


def test_tiers_are_drawn_as_the_server_counts_them(page: Page, fresh_server: Factory, tmp_path: Path) -> None:
    """Bytes, hits, misses, damage and failures of each tier by kind; a breaker that is open; the last receipts."""
    live = fresh_server(
        engine_process=False, num_blocks=32, state_dir=str(tmp_path), state_host_memory="1MiB", state_load="always"
    )
    text = live.ask("POST", "/state/objects", {"text": "kept", "metadata": {"name": HOSTILE, "durable": True}}).json
    talk = live.ask("POST", "/state/objects", {"messages": [{"role": "user", "content": "x"}]}).json
    opened(page, live)
    for number in range(4):
        live.complete(f"{number % 2} is a prompt that fills the pool " * 10, max_tokens=2)
    whats = "[...document.querySelectorAll('#events-body .what')].map((node) => node.textContent)"
    page.until(f"{whats}.some((what) => what.startsWith('load, '))")
    live.ask("POST", "/state/evict", {"tier": "host", "bytes": 1 << 20})
    (file,) = [one for one in (tmp_path / "texts").iterdir() if one.name.startswith(talk["state_id"])]
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert live.get(f"/state/objects/{talk['state_id']}").status == 404
    live.services.engine.link.engine_loop.engine.parts.state.store.plane.places["disk"].writes.trip("full")
    until(lambda: live.services.engine.stats.tiers["disk"]["breaker"]["writes"] == "open", "it is not told")
    page.until("document.querySelector('#tiers-body .alarm')?.textContent === 'writes left alone'")
    tiers = live.get("/state/tiers").json["tiers"]
    page.until(f"document.querySelectorAll('#tiers-body tr.tier').length === {1 + len(tiers)}")
    drawn = page.run(TIERS)
    for name, facts in tiers.items():
        for shown, counts in ((name, facts), *((f"{name} {kind}", own) for kind, own in facts["kinds"].items())):
            assert drawn[shown] == [f"{counts[key]:,}" for key in ("hits", "misses", "corrupt", "failures")], shown
    assert drawn["disk session"][2] == "1" and page.text("#tiers-body .tally-bad") == "1"
    receipts = page.run("[...document.querySelectorAll('#receipts .what')].map((node) => node.textContent)")
    assert {"get", "evict, host", "put"} <= {one if one.startswith("evict") else one.split(",")[0] for one in receipts}
    assert page.run("document.querySelectorAll('#receipts .bad').length") >= 1
    for width, height in ((1400, 900), (1180, 780), (900, 1200), (420, 900)):
        page.resize(width, height)
        page.until(f"innerWidth === {width}")
        assert page.run("document.documentElement.scrollWidth") <= width and not page.run(OVERLAPS)
        assert page.run(OUTSIDE) == []
    assert page.run("document.querySelectorAll('main img').length") == 0 and page.complaints == []
    assert live.ask("DELETE", f"/state/objects/{text['state_id']}").status == 200


def test_hostile_names_are_text_and_nobody_else_is_asked(page: Page, big: LiveServer) -> None:
    opened(page, big)
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    big.engine.post(lambda: big.engine.add_request([1, 2, 3], params, request_id=HOSTILE))
    with busy(big, 1):  # a step takes the command
        page.until(
            f"[...document.querySelectorAll('.lane .id')].some((node) => node.textContent === {json.dumps(HOSTILE)})"
        )
        big.engine.post(lambda: big.engine.abort(HOSTILE))
    assert page.text("#model") == HOSTILE
    page.until("[...document.querySelectorAll('#events-body .id')].some((node) => node.textContent.startsWith('<img'))")
    assert page.run("document.querySelectorAll('main img, header img').length") == 0
    assert page.run("document.title") == "nanovllm"
    assert page.requests and all(url.startswith(big.server.url + "/") for url in page.requests)
    assert page.complaints == []


def test_what_the_page_says_where_there_is_nothing_to_draw(page: Page, fresh_server: Factory) -> None:
    live = fresh_server(engine_process=False)
    opened(page, live)
    page.until("document.querySelector('#lanes-body .empty')")
    assert "curl " in page.text("#lanes-body") and "Nothing has happened yet." in page.text("#events-body")
    live.services.engine.state = "dead"
    page.until("document.body.dataset.state === 'dead'")
    assert "has ended" in page.text("#notice") and page.run("document.body.classList.contains('stale')")
    live.services.engine.state = "ready"
    page.until("document.body.dataset.state === 'ready' && document.getElementById('notice').hidden")
    live.services.is_loaded = False
    page.until("document.body.dataset.state === 'loading'")
    assert "loading" in page.text("#notice")
    live.services.is_loaded = True
    live.stop()
    page.until("document.body.dataset.state === 'retrying'")
    assert "Trying again" in page.text("#notice")
    again = fresh_server(engine_process=False, port=live.port)
    page.until("document.body.dataset.state === 'ready' && !document.body.classList.contains('stale')")
    assert again.get("/health/ready").status == 200


def test_the_admin_key_is_asked_for_and_stays_in_the_tab(page: Page, server: Factory) -> None:
    live = server(api_key=("alice:user-key-1", "user-key-2"), admin_key="admin-key")
    opened(page, live)
    page.until("!document.getElementById('key-form').hidden")
    assert page.run("document.querySelectorAll('.lane').length") == 0
    give_key(page, "user-key-2")
    page.until("document.getElementById('notice').textContent.includes('admin key')")
    give_key(page, "admin-key")
    page.until("document.body.dataset.state === 'ready' && document.getElementById('key-form').hidden")
    assert page.run("[localStorage.length, document.cookie, location.search + location.hash]") == [0, "", ""]
    assert page.run("Object.values(sessionStorage)") == ["admin-key"]
    assert not any("key" in url for url in page.requests)
    page.run("sessionStorage.clear()")
