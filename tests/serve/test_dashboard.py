"""The dashboard's files and feed: contract, bounds, keys and ends, with the engine in a thread and in a process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.messages import EngineInfo, EngineStats, Finished, RequestView, StateView, Timings
from nanovllm.serve.app import build_services
from nanovllm.serve.dashboard import feed as feed_module
from nanovllm.serve.dashboard.board import ENDED, EVENTS, RECEIPTS, Board
from nanovllm.serve.dashboard.feed import FEED_PATH, MAX_PENDING, MAX_VIEWERS, Viewer
from nanovllm.serve.dashboard.pages import PAGE_PATHS, PAGES, STATIC
from tests.serve.servers import LiveServer, assert_alive, assert_at_rest, split, until

Factory = Callable[..., LiveServer]
KEYED = {"api_key": ("alice:user-key-1", "user-key-2"), "admin_key": "admin-key"}
MAX_SILENCES = 3  # of 15 s each
PROMPT = "the walrus sings at noon "


class Watcher:
    """One viewer over a real connection: its messages, and the page's state as they make it."""

    def __init__(self, live: LiveServer, **headers: str) -> None:
        self.connection = http.client.HTTPConnection(live.host, live.port, timeout=30)
        self.connection.request("GET", FEED_PATH, headers={**live.headers, **headers})
        self.reply = self.connection.getresponse()
        self.status = self.reply.status
        self.raw = b""
        self.requests: dict[str, Any] = {}
        self.sets: dict[str, set[int]] = {"cached": set(), "held": set()}
        self.ended: list[Any] = []
        self.events: list[Any] = []
        self.receipts: list[Any] = []
        self.last: dict[str, Any] = {}
        self.state = ""

    def message(self) -> dict[str, Any] | None:
        """The next one, comments passed over; None at the end."""
        silences = 0
        while line := self.reply.readline():
            self.raw += line
            silences += line.startswith(b": ping")
            assert silences < MAX_SILENCES, "it does not come"
            if line.startswith(b"data: "):
                return json.loads(line.removeprefix(b"data: "))
        return None

    def take(self) -> dict[str, Any] | None:
        """The next one, applied as the page applies it."""
        message = self.message()
        if message is None:
            return None
        if message["type"] == "status":
            self.state = message["state"]
            return message
        if message["type"] == "snapshot":
            self.requests, self.ended, self.events, self.receipts = {}, [], [], []
            self.sets = {name: set(message[name]) for name in self.sets}
        else:
            for name, kept in self.sets.items():
                kept.difference_update(message[name]["drop"])
                kept.update(message[name]["add"])
        for gone in message.get("gone", ()):
            del self.requests[gone]
        for one in message["requests"]:
            self.requests[one["id"]] = {**self.requests.get(one["id"], {}), **one}
        self.ended += message["ended"]
        self.events += message["events"]
        self.receipts += message["receipts"]
        self.last = message
        return message

    def take_until(self, condition: Callable[[], Any]) -> Any:
        while not (value := condition()):
            assert self.take() is not None, "the stream has ended"
        return value

    def close(self) -> None:
        self.reply.close()
        self.connection.close()


@pytest.fixture(scope="module")
def by_mode() -> Iterator[dict[bool, LiveServer]]:
    kept: dict[bool, LiveServer] = {}
    yield kept
    for live in kept.values():
        if live.is_running:
            live.stop()


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def live(by_mode: dict[bool, LiveServer], request: pytest.FixtureRequest) -> LiveServer:
    """A server with its engine in a thread, and one with it in a process of its own."""
    if request.param not in by_mode or not by_mode[request.param].is_running:
        by_mode[request.param] = LiveServer(engine_process=request.param, num_blocks=256).start()
    return by_mode[request.param]


@contextlib.contextmanager
def watching(live: LiveServer, **headers: str) -> Iterator[Watcher]:
    watcher = Watcher(live, **headers)
    try:
        yield watcher
    finally:
        watcher.close()


@contextlib.contextmanager
def asked(live: LiveServer, count: int, **fields: Any) -> Iterator[None]:
    """`count` requests under way."""
    threads = [
        threading.Thread(target=live.complete, args=(f"{PROMPT * 4}{number}",), kwargs=fields)
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


# -- the feed ---------------------------------------------------------------------------------------


def test_the_feed_tells_of_a_request_from_its_arrival_to_its_end(live: LiveServer) -> None:
    assert_at_rest(live)
    with watching(live) as watcher:
        assert watcher.status == 200 and watcher.reply.getheader("content-type") == "text/event-stream; charset=utf-8"
        assert watcher.take() == {"type": "status", "state": "ready"}
        watcher.take_until(lambda: watcher.last)
        engine = next(json.loads(line[6:]) for line in watcher.raw.splitlines() if b'"snapshot"' in line)["engine"]
        assert (engine["model"], engine["label"], engine["block_size"]) == ("tiny:random", "measured", 16)
        with asked(live, 3, max_tokens=900, ignore_eos=True):
            running = watcher.take_until(lambda: [r for r in watcher.requests.values() if r["stage"] == "decode"])[0]
            stats = watcher.last["stats"]
            held = {i for one in watcher.requests.values() for i in one["block_ids"]}
            assert len(held) == stats["num_blocks"] - stats["free_blocks"]
            assert not held & watcher.sets["cached"] and len(watcher.sets["cached"]) == stats["cached_blocks"]
            terms = running["terms"]
            assert terms["ttft"] == pytest.approx(
                sum(terms[t] for t in ("queue", "schedule", "prefill", "return")), abs=0.01
            )
            assert 0 < terms["intake"] <= terms["queue"]
        watcher.take_until(lambda: not watcher.requests and watcher.last["stats"]["running"] == 0)
        mine = [one for one in watcher.ended if one["id"] == running["id"]]
        assert [(one["reason"], one["output_tokens"]) for one in mine] == [("length", 900)]
        assert mine[0]["terms"] == terms
        stages = [
            event["stage"] for event in watcher.events if event["request_id"] == running["id"] and "stage" in event
        ]
        assert stages[0] == "entered" and stages[-2:] == ["output_complete", "state_released"]
        assert "decode_step" not in stages
    assert b"walrus" not in watcher.raw
    assert_alive(live)


def test_the_feed_tells_of_the_tiers_and_of_what_was_done_to_state(live: LiveServer) -> None:
    with watching(live) as watcher:
        kept = live.ask("POST", "/state/objects", {"text": "a text of nobody", "metadata": {"name": "shown"}}).json
        watcher.take_until(lambda: any(one["state_id"] == kept["state_id"] for one in watcher.receipts))
        (receipt,) = [one for one in watcher.receipts if one["state_id"] == kept["state_id"]]
        assert (receipt["action"], receipt["ok"], receipt["seq"]) == ("put", True, kept["seq"])
        watcher.take_until(lambda: watcher.last.get("stats", {}).get("tiers", {}).get("host", {}).get("by_kind"))
        assert watcher.last["stats"]["tiers"].keys() == live.get("/state/tiers").json["tiers"].keys()
        assert b"a text of nobody" not in watcher.raw
        live.ask("DELETE", f"/state/objects/{kept['state_id']}")
        watcher.take_until(lambda: watcher.receipts[-1]["action"] == "drop")
        numbers = [one["seq"] for one in watcher.receipts]
        assert numbers == sorted(set(numbers)), "each is told once"


def test_shared_blocks_are_in_both_tables(server: Factory) -> None:
    live = server(num_blocks=256)
    live.complete(PROMPT * 8, max_tokens=1)  # its prefix stays cached
    with watching(live) as watcher, asked(live, 2, max_tokens=1200, ignore_eos=True):
        both = watcher.take_until(
            lambda: [r for r in watcher.requests.values() if r["stage"] == "decode"][1:] and watcher.requests
        )
        tables = [set(one["block_ids"]) for one in both.values()]
        assert len(set.intersection(*tables)) >= len(PROMPT * 4) // 16 - 1
        assert any(one["cached_tokens"] for one in both.values())


def test_the_engine_says_nothing_while_nobody_looks(live: LiveServer) -> None:
    views: list[StateView] = []
    live.services.engine.viewers.append(views.append)
    try:
        until(lambda: live.services.feed.num_viewers == 0, "a viewer is left")
        live.complete("a request that takes a few steps", max_tokens=40, ignore_eos=True)
        assert not views
        with watching(live) as watcher:
            watcher.take_until(lambda: watcher.last)
        until(lambda: live.services.feed.num_viewers == 0, "the viewer that left is still counted")
        live.complete("more")  # a view that was on its way has arrived
        count = len(views)
        live.complete("a request that takes a few steps", max_tokens=40, ignore_eos=True)
        assert count >= 1 and len(views) == count
    finally:
        live.services.engine.viewers.remove(views.append)


def test_increments_come_at_most_four_times_a_second(server: Factory) -> None:
    live = server()
    with watching(live) as watcher, asked(live, 2, max_tokens=1200, ignore_eos=True):
        moments = []
        watcher.take_until(lambda: watcher.requests)
        while watcher.take() and watcher.requests:
            moments.append(watcher.last["ts_ms"])
    gaps = [after - before for before, after in pairwise(moments)]
    assert all(gap >= 1000 * feed_module.PERIOD_S * 0.99 for gap in gaps), gaps


def test_a_request_that_waits_says_why(fresh_server: Factory) -> None:
    live = fresh_server(num_blocks=48, max_model_len=512)
    with watching(live) as watcher, asked(live, 4, max_tokens=800, ignore_eos=True):
        watcher.take_until(lambda: {event.get("reason") for event in watcher.events} & {"blocks", "headroom"})


# -- bounds and ends --------------------------------------------------------------------------------


def test_viewers_are_bounded(fresh_server: Factory) -> None:
    live = fresh_server()
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_VIEWERS):
            assert stack.enter_context(watching(live)).status == 200
        answer = live.get(FEED_PATH)
        assert (answer.status, answer.code) == (503, "server_overloaded")
    until(lambda: live.services.feed.num_viewers == 0, "viewers are left")
    with watching(live) as watcher:
        assert watcher.status == 200
    assert live.ask("HEAD", FEED_PATH).status == 200
    assert_alive(live)


def test_a_slow_viewer_is_owed_a_snapshot_and_no_more() -> None:
    async def check() -> None:
        viewer = Viewer(lambda: b"snapshot")
        for number in range(1000):
            viewer.put(b"%d" % number)  # nothing is kept before the first snapshot
        assert await viewer.take(1.0) == b"snapshot"
        for number in range(MAX_PENDING):
            viewer.put(b"%d " % number)
        assert await viewer.take(1.0) == b"".join(b"%d " % number for number in range(MAX_PENDING))
        for number in range(MAX_PENDING + 1):
            viewer.put(b"%d " % number)
        assert await viewer.take(1.0) == b"snapshot"
        assert await viewer.take(0.001) == b": ping\n\n"
        viewer.end()
        assert await viewer.take(60.0) is None

    asyncio.run(check())


def test_a_viewer_that_takes_nothing_is_given_up(fresh_server: Factory) -> None:
    live = fresh_server(write_timeout=0.5, num_blocks=4000)
    feed = live.services.feed
    with live.connect() as sock:
        sock.sendall(f"GET {FEED_PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        until(lambda: feed.num_viewers == 1, "it did not come in")
        frame = b"data: " + b"x" * 2**20 + b"\n\n"

        def push() -> bool:
            for viewer in list(feed._viewers):
                live.server._loop.call_soon_threadsafe(viewer.put, frame)  # more than any socket buffers
            return feed.num_viewers == 0

        until(push, "it is still a viewer")
    assert_alive(live)


@pytest.mark.parametrize("live", [True], ids=["process"], indirect=True)
def test_an_engine_that_ends_and_its_successor(live: LiveServer) -> None:
    with watching(live) as watcher:
        watcher.take_until(lambda: watcher.last)
        live.services.engine.link.kill()
        watcher.take_until(lambda: watcher.state == "loading")
        watcher.last = {}
        watcher.take_until(lambda: watcher.last.get("type") == "snapshot")
        assert watcher.state == "ready"
        live.complete("after the restart")
        watcher.take_until(lambda: watcher.ended)


def test_a_drain_is_shown_and_ends_the_streams(live: LiveServer) -> None:
    with watching(live) as watcher:
        watcher.take_until(lambda: watcher.last)
        with asked(live, 1, max_tokens=1500, ignore_eos=True):
            watcher.take_until(lambda: watcher.requests)
            live.server.stop()
            watcher.take_until(lambda: watcher.state == "draining")
        while watcher.take() is not None:
            pass
        assert watcher.reply.isclosed()
    live.stop()


def test_a_picture_that_cannot_be_made_harms_no_request(fresh_server: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    live = fresh_server(engine_process=False)
    watch = live.services.engine.link.engine_loop._watch
    monkeypatch.setattr(watch, "_news", lambda: 1 / 0)
    with watching(live) as watcher:
        assert watcher.take() == {"type": "status", "state": "ready"}
        until(lambda: not watch.is_on, "it is tried again and again")
        assert live.complete("unharmed").status == 200


# -- who may look -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        (None, 401, "invalid_api_key"),
        ("wrong", 401, "invalid_api_key"),
        ("user-key-2", 403, "access_denied"),
        ("admin-key", 200, ""),
    ],
)
def test_the_feed_is_for_the_admin_where_there_are_keys(
    server: Factory, key: str | None, status: int, code: str
) -> None:
    with watching(server(**KEYED), Authorization=f"Bearer {key}" if key else "") as watcher:
        assert watcher.status == status
        assert not code or json.loads(watcher.reply.read())["error"]["code"] == code


def test_without_an_admin_key_no_user_sees_everybodys_requests(server: Factory) -> None:
    answer = server(api_key=("only-key",)).get(FEED_PATH)
    assert (answer.status, answer.code) == (403, "access_denied") and "--admin-key" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}]
)
@pytest.mark.parametrize("path", ["/", FEED_PATH])
def test_other_sites_see_neither_page_nor_feed(server: Factory, path: str, headers: dict[str, str]) -> None:
    assert server().get(path, **headers).status == 403


# -- the files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_a_file_is_whole_and_closed(server: Factory, path: str) -> None:
    live = server(**KEYED)
    answer = live.get(path, Authorization="")
    file = STATIC / ("index.html" if path == "/" else path.rpartition("/")[2])
    assert answer.status == 200 and answer.body == file.read_bytes()
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in answer.headers
    again = live.get(path, **{"If-None-Match": answer.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert live.get(path, **{"If-None-Match": '"other"'}).status == 200


@pytest.mark.parametrize(
    "path",
    ["/dashboard/../app.py", "/dashboard/%2e%2e/app.py", "/dashboard/static/index.html", "/dashboard/board.py",
     "/dashboard//etc/passwd", "/dashboard/dashboard.css/", "/dashboard/.", "/dashboard/main.js%00"],
)  # fmt: skip
def test_no_path_leads_elsewhere(server: Factory, path: str) -> None:
    assert server().get(path).status == 404
    assert server(**KEYED).get(path, Authorization="Bearer wrong").status == 401


def test_the_files_hold_nothing_inline_and_nobody_elses_address() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
    assert len(PAGES) == len(texts)
    for name, text in texts.items():
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text, name
        assert "://" not in text.replace("http://www.w3.org/", ""), name
        assert "<style" not in text and " style=" not in text and " onclick" not in text, name
        assert len(text.splitlines()) <= 300, name
    assert "eval(" not in "".join(texts.values())


# -- the board --------------------------------------------------------------------------------------

INFO = EngineInfo("m", 10, 64, 16, 8, 4, 64, "reuse", "float32", "cpu")
ids = st.lists(st.integers(0, 7), max_size=4)
requests = st.builds(
    RequestView,
    st.sampled_from(["a", "b", "c", "<b>"]),
    st.sampled_from(["queued", "decode"]),
    st.integers(0, 10**9),
    block_ids=ids,
)
views = st.builds(
    StateView,
    st.integers(0, 10**12),
    st.just(EngineStats(num_blocks=8)),
    st.lists(requests, max_size=4, unique_by=lambda one: one.request_id),
    st.integers(0, 4),
    ids,
    ids,
    st.lists(st.builds(lambda seq: {"seq": seq}, st.integers(0, 99)), max_size=3),
    st.integers(0, 2),
    st.lists(st.builds(lambda seq: {"seq": seq}, st.integers(0, 99)), max_size=3),
)
ends = st.builds(Finished, st.sampled_from(["a", "b"]), timings=st.builds(Timings, st.integers(0, 10**9)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(views, ends), min_size=1, max_size=30), st.integers(0, 10))
def test_a_snapshot_and_its_increments_make_the_next_snapshot(steps: list[Any], start: int) -> None:
    board, watcher = Board(), Watcher.__new__(Watcher)
    watcher.message = lambda: json.loads(json.dumps(told))  # type: ignore[method-assign]
    watcher.sets, is_open = {"cached": set(), "held": set()}, False
    for number, step in enumerate(steps):
        if isinstance(step, Finished):
            board.ended(step)
            continue
        told = board.take(step)
        if is_open:
            watcher.take()
        elif number >= start:
            told, is_open = board.snapshot(INFO, "m"), True
            watcher.take()
        if is_open:
            now = json.loads(json.dumps(board.snapshot(INFO, "m")))
            assert {one["id"]: one for one in now["requests"]} == watcher.requests
            assert {name: set(now[name]) for name in watcher.sets} == watcher.sets
            assert now["ended"] == watcher.ended[-ENDED:] and now["events"] == watcher.events[-EVENTS:]
            assert now["receipts"] == watcher.receipts[-RECEIPTS:]


def test_what_ended_is_bounded_while_nobody_looks() -> None:
    services = build_services(*split({}))
    report = type("Report", (), {"finished": [Finished("r", timings=Timings(0))] * 10 * ENDED})()
    for listener in services.engine.listeners:
        if getattr(listener, "__self__", None) is services.feed:
            listener(report)
    assert len(services.feed._board._ended) == len(services.feed._board._new) == ENDED
    services.pool.shutdown()


def test_time_stands_still_for_nobody(server: Factory) -> None:
    """An idle engine is looked at too: a view a second, so that a page can tell it from a hanging one."""
    with watching(server()) as watcher:
        watcher.take_until(lambda: watcher.last)
        first, start_s = watcher.last["ts_ms"], time.monotonic()
        watcher.take_until(lambda: watcher.last["ts_ms"] > first)
        assert time.monotonic() - start_s < 20
