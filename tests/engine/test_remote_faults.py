"""S11: a shared server that is killed, paused, slow, full, flushed, closed, cut off or full of lies. Serving goes on.

Its tokens are those of a cold run. What each costs in time: `tests/exact/test_remote_ttft.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis

from nanovllm import LLM
from nanovllm.errors import ConfigError
from nanovllm.state.place import Place
from tests.engine.test_state_exact import GREEDY, PROMPT, TINY, cold, forget_device, settle  # noqa: F401
from tests.state.servers import Proxy, free_port, needs_server, running_server

QUICK = "?socket_timeout=0.25&socket_connect_timeout=0.25"
REQUESTS = [7, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
OTHER = [(5 * i + 3) % 250 for i in range(70)]

pytestmark = needs_server


@dataclass
class Shared:
    """An engine with a server behind a proxy, and the server laid open."""

    llm: LLM
    client: redis.Redis
    process: subprocess.Popen[bytes]
    proxy: Proxy

    @property
    def place(self) -> Place:
        return self.llm.state_store.plane.places["remote"]

    def values(self) -> list[bytes]:
        """The keys of the parts."""
        return sorted(key for key in self.client.scan_iter() if key.count(b":") == 2)

    def heads(self) -> list[bytes]:
        return sorted(key for key in self.client.scan_iter() if key.count(b":") == 1)

    def ask(self, prompt: list[int] = PROMPT) -> Any:
        """One request of an engine whose device has forgotten everything."""
        forget_device(self.llm)
        (final,) = self.llm.generate([prompt], GREEDY)
        assert final.error is None
        return final


@contextlib.contextmanager
def shared(folder: Path, *options: str, timeouts: str = QUICK) -> Iterator[Shared]:
    with running_server(folder, *options) as (url, process):
        proxy = Proxy(url)
        with LLM(**TINY, state_remote=proxy.url + timeouts) as llm:
            client = redis.Redis.from_url(url, retry=None)
            yield Shared(llm, client, process, proxy)
            client.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        proxy.close()


def slow(one: Shared) -> None:
    one.proxy.delay_s = 0.6  # more than the client waits


LONG = ("paused", "parted", "closed")  # to a client they are as the others
Fault = Callable[[Shared], object]
GONE: dict[str, Fault] = {
    "killed": lambda one: (one.process.kill(), one.process.wait()),
    "paused": lambda one: os.kill(one.process.pid, signal.SIGSTOP),
    "slow": slow,
    "parted": lambda one: setattr(one.proxy, "is_parted", True),
    "cut": lambda one: setattr(one.proxy, "cut_after", 0),
    "closed": lambda one: (one.client.config_set("requirepass", "secret"), one.client.client_kill_filter(skipme=True)),
}


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("fault", ["killed", "slow", "cut", *(pytest.param(f, marks=pytest.mark.long) for f in LONG)])
def test_a_server_that_does_not_answer_costs_a_few_waits(
    cold: list[int],  # noqa: F811
    tmp_path: Path,
    fault: str,
    requests: int,
) -> None:
    with shared(tmp_path) as one:
        assert one.ask().token_ids == cold
        assert one.ask().hit_tokens_by_tier == {"remote": 68}
        GONE[fault](one)
        for _ in range(requests):
            assert one.ask().token_ids == cold
        counters = one.place.counters
        assert one.place.reads.state == "open" and counters.failures >= 5 and counters.corrupt == 0
        failures, hits = one.place.tally.kinds["kv"].failures, counters.hits
        final = one.ask()
        assert (final.token_ids, final.cached_tokens, final.timeline.state_wait_ns) == (cold, 0, 0), "left alone"
        assert (one.place.tally.kinds["kv"].failures, counters.hits) == (failures, hits)
        assert one.llm.generate([OTHER], GREEDY)[0].timeline.state_wait_ns == 0, "nor asked for what is new"


def test_a_paused_server_that_comes_back_is_used_again(cold: list[int], tmp_path: Path) -> None:  # noqa: F811
    with shared(tmp_path) as one:
        one.ask()
        one.ask()
        os.kill(one.process.pid, signal.SIGSTOP)
        for _ in range(6):
            one.ask()
        assert one.place.reads.state == "open"
        os.kill(one.process.pid, signal.SIGCONT)
        for breaker in (one.place.reads, one.place.writes):
            breaker._cooldown_ns = 0  # thirty seconds have passed
        assert one.ask().hit_tokens_by_tier == {"remote": 68} and one.place.reads.state == "closed"


def test_a_flushed_server_is_written_to_again(cold: list[int], tmp_path: Path) -> None:  # noqa: F811
    with shared(tmp_path) as one:
        one.ask()
        one.ask()
        one.client.flushall()
        final = one.ask()
        assert (final.token_ids, final.cached_tokens) == (cold, 0) and one.place.counters.misses > 0
        settle(one.llm)
        assert len(one.heads()) >= 17
        assert one.ask().hit_tokens_by_tier == {"remote": 68}
        assert one.place.counters.failures == 0 and one.place.reads.state == "closed"


def swap(one: Shared) -> None:
    names = one.values()
    first = one.client.get(names[0])
    for name, other in itertools.pairwise(names):
        one.client.set(name, one.client.get(other))
    one.client.set(names[-1], first)


def each(change: Callable[[redis.Redis, bytes], object], of: str = "values") -> Fault:
    def fault(one: Shared) -> None:
        for name in getattr(one, of)():
            change(one.client, name)

    return fault


def as_list(client: redis.Redis, name: bytes) -> None:
    client.delete(name)
    client.rpush(name, "x")


LIES: dict[str, tuple[Fault, bool]] = {  # and whether the reader calls it damage, or finds nothing
    "swapped": (swap, True),
    "flipped": (each(lambda client, name: client.setrange(name, 700, b"\xff\x00\xff")), True),
    "truncated": (each(lambda client, name: client.set(name, client.get(name)[:-1])), True),
    "longer": (each(lambda client, name: client.append(name, b"x" * 100)), True),
    "random": (each(lambda client, name: client.set(name, os.urandom(2000))), True),
    "pickle": (each(lambda client, name: client.set(name, b"cposix\nsystem\n(S'touch owned'\ntR.")), True),
    "empty": (each(lambda client, name: client.set(name, b"")), False),
    "too large": (lambda one: one.client.setrange(one.values()[3], 60 << 20, b"x"), False),
    "too many parts": (each(lambda client, name: client.set(name, b"\xff\xff\xff\x7f"), "heads"), False),
    "no number": (each(lambda client, name: client.set(name, b"\x01"), "heads"), False),
    "another type": (each(as_list), False),
    "a head of another type": (each(as_list, "heads"), False),
}


@pytest.fixture(scope="module")
def lied_to(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared(tmp_path_factory.mktemp("lied_to"), timeouts="") as one:  # megabytes, on a machine that may be busy
        yield one


@pytest.mark.parametrize("lie", LIES)
def test_what_lies_under_our_keys_is_ours_or_a_miss(cold: list[int], lied_to: Shared, lie: str) -> None:  # noqa: F811
    """Attacks 2 and 35, by hand on the server. The engine computes, counts and writes what was right."""
    one, (fault, is_damage) = lied_to, LIES[lie]
    one.client.flushall()
    for _ in range(3):
        final = one.ask()
    assert (final.token_ids, final.hit_tokens_by_tier) == (cold, {"remote": 68})
    before, state = replace(one.place.counters), one.llm.engine.parts.state
    assert state is not None
    failed, bytes_back = state.counters.loads_failed, one.proxy.bytes_back
    fault(one)
    final = one.ask()
    assert final.token_ids == cold and final.cached_tokens < 68
    now = one.place.counters
    assert (
        (now.corrupt > before.corrupt) == is_damage and now.misses > before.misses and now.failures == before.failures
    )
    assert state.counters.loads_failed == failed + 1
    assert one.proxy.bytes_back - bytes_back < 6 << 20, "no more is fetched of a key than may lie there"
    for _ in range(3):
        final = one.ask()
        assert final.token_ids == cold
    assert final.cached_tokens == 68, "mended by what was computed"


def test_only_who_has_the_key_is_believed(cold: list[int], tmp_path: Path) -> None:  # noqa: F811
    """Attack 35: what another engine of the same model wrote with another key, or with none, is not taken for true."""
    files = {name: tmp_path / name for name in ("ours", "theirs")}
    for file in files.values():
        file.write_text(f"a secret of {file.name}")

    def ask(llm: LLM) -> Any:
        forget_device(llm)
        (final,) = llm.generate([PROMPT], GREEDY)
        assert final.token_ids == cold
        settle(llm)
        return final.cached_tokens

    with running_server(tmp_path) as (url, _):
        ours, theirs = ({"state_remote": url, "state_remote_key_file": str(file)} for file in files.values())
        with LLM(**TINY, **ours) as first, LLM(**TINY, **ours) as second:
            assert ask(first) == 0 and ask(second) == 68, "the same key"
            for others in (theirs, {"state_remote": url}):
                with redis.Redis.from_url(url) as client:
                    client.flushall()
                with LLM(**TINY, **others) as stranger:
                    assert ask(stranger) == 0
                with LLM(**TINY, **ours) as third:
                    assert ask(third) == 0 and third.state_store.plane.places["remote"].counters.corrupt > 0


def test_a_key_file_must_hold_a_key(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_text("secret")
    with long.open("wb") as file:
        file.truncate(1 << 40)  # a hole: whoever read it whole would read a terabyte
    for settings in (
        {"state_remote": "redis://127.0.0.1:1", "state_remote_key_file": str(short)},
        {"state_remote": "redis://127.0.0.1:1", "state_remote_key_file": str(long)},
        {"state_remote": "redis://127.0.0.1:1", "state_remote_key_file": "/dev/zero"},
        {"state_remote": "redis://127.0.0.1:1", "state_remote_key_file": str(tmp_path / "nowhere")},
        {"state_remote_key_file": str(short)},
    ):
        with pytest.raises(ConfigError) as refused:
            LLM(**TINY, **settings)
        assert refused.value.param == "state_remote_key_file" and refused.value.hint


def test_a_full_server_stops_the_writing(cold: list[int], tmp_path: Path) -> None:  # noqa: F811
    with shared(tmp_path, "--maxmemory", "100kb", "--maxmemory-policy", "noeviction") as one:
        for _ in range(3):
            assert one.ask().token_ids == cold
        assert one.place.writes.state == "open" and one.place.writes.reason == "full"
        assert one.place.counters.failures > 0 and one.place.counters.bytes_written == 0


@pytest.mark.parametrize("address", ["nobody", "password", "stranger"])
def test_a_server_that_never_was_one_keeps_nobody_from_starting(
    cold: list[int],  # noqa: F811
    tmp_path: Path,
    address: str,
) -> None:
    with contextlib.ExitStack() as stack:
        url = f"redis://127.0.0.1:{free_port()}/0"
        if address == "password":
            url, _ = stack.enter_context(running_server(tmp_path, "--requirepass", "secret"))
        if address == "stranger":
            url = stack.enter_context(_stranger())
        llm = stack.enter_context(LLM(**TINY, state_remote=url + QUICK))
        assert any("serving goes on without it" in warning for warning in llm.state_store.warnings)
        for _ in range(7):
            forget_device(llm)
            assert llm.generate([PROMPT], GREEDY)[0].token_ids == cold
        place = llm.state_store.plane.places["remote"]
        assert place.reads.state == "open" and place.counters.failures >= 5 and place.counters.hits == 0


@contextlib.contextmanager
def _stranger() -> Iterator[str]:
    """A server that speaks HTTP."""
    import http.server
    import threading

    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://127.0.0.1:{server.server_port}/0"
        server.shutdown()


@pytest.mark.parametrize("fault", ["", "paused", "slow"])
def test_what_is_deleted_goes_from_the_server_now_or_when_it_answers_again(
    cold: list[int],  # noqa: F811
    tmp_path: Path,
    fault: str,
) -> None:
    with shared(tmp_path) as one:
        store = one.llm.state_store
        state_id = store.put(PROMPT)
        other = store.put(OTHER)
        for prompt in (PROMPT, OTHER):
            one.llm.generate([prompt], GREEDY)
            settle(one.llm)
        theirs = {_name(digest) for digest in store.find(other).chain}
        ours = {_name(digest) for digest in store.find(state_id).chain}
        assert len(ours) == 17 and ours | theirs <= set(one.heads())
        if fault:
            GONE[fault](one)
        receipt = store.drop(state_id)
        assert receipt.ok != bool(fault) and store.match(PROMPT).num_tokens == 0
        if fault:
            assert "not yet removed from remote" in receipt.reason
            os.kill(one.process.pid, signal.SIGCONT)
            one.proxy.delay_s = 0.0
            for _ in range(5):  # the debt is paid by the next steps
                store.tick()
                store.settle()
        left = set(one.client.scan_iter())
        assert not ours & left and theirs <= left, "nothing else went"
        assert not any(name.startswith(head + b":") for head in ours for name in left), "its parts neither"
        assert not store.plane.debts.by_tier["remote"] and one.place.writes.state == "closed"


def _name(digest: bytes) -> bytes:
    return b"nanovllm:" + digest.hex().encode()
