"""Real KV through real tiers, float32: the tokens of a cold run, whatever was evicted, shared, damaged or killed.

Every kind, tier and hit length is in `tests/exact/test_state_matrix.py`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ConfigError, EngineClosedError, StateFolderError
from tests.state.servers import needs_server, running_server

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "model": "tiny:random", "dtype": "float32", "block_size": 4, "num_blocks": 40, "max_model_len": 160,
    "check_invariants": True, "state_load": "always", "progress": False,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = [(7 * i + i * i) % 250 for i in range(70)]


def settle(llm: LLM) -> None:
    """Idle steps until nothing waits to be written."""
    while not llm.engine.scheduler.kv.is_settled():
        llm.engine.step()


def forget_device(llm: LLM) -> None:
    """What nobody holds leaves the pool; the tiers below keep what they have."""
    settle(llm)
    assert llm.engine.parts.state is not None
    device = llm.engine.parts.state.device
    for digest in list(device.manager.hash_to_block_id):
        assert device.discard(digest)


@pytest.fixture(scope="module")
def cold() -> Iterator[list[int]]:
    with LLM(**{**TINY, "prefix_mode": "off"}) as llm:
        yield llm.generate([PROMPT], GREEDY)[0].token_ids


def test_what_came_from_the_disk_after_a_restart_lies_in_memory_next(cold: list[int], tmp_path: Path) -> None:
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        llm.generate([PROMPT], GREEDY)
    with LLM(**TINY, state_dir=str(tmp_path), state_host_memory="8MiB") as llm:
        for tier in ("disk", "host"):
            (final,) = llm.generate([PROMPT], GREEDY)
            assert final.token_ids == cold and final.hit_tokens_by_tier == {tier: 68}
            assert final.timeline.t_queue_ns >= final.timeline.state_wait_ns > 0
            forget_device(llm)


def test_a_pool_that_overflows_spills_and_restores(cold: list[int], tmp_path: Path) -> None:
    """Several conversations share a pool that holds one and a half of them."""
    with LLM(**TINY, state_dir=str(tmp_path), state_host_memory="100KiB") as llm:
        others = [[i, *PROMPT[:60]] for i in range(4)]
        first = [out.token_ids for out in llm.generate(others, GREEDY)]
        assert llm.generate([PROMPT], GREEDY)[0].token_ids == cold
        assert [llm.generate([prompt], GREEDY)[0].token_ids for prompt in others] == first
        again = llm.generate([PROMPT], GREEDY)[0]
        assert again.token_ids == cold and again.cached_tokens == 68
        assert llm.state_store.top()["tiers"]["host"]["evicted"] > 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_folder_costs_time_and_never_a_token(cold: list[int], tmp_path: Path, damage: str) -> None:
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        llm.generate([PROMPT], GREEDY)
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        for path in [path for path in tmp_path.rglob("*.seg*") if path.is_file()]:
            data = bytearray(path.read_bytes())
            for i in range(len(data) // 2, len(data), 997):
                data[i] ^= 0x10
            half = bytes(data[: len(data) // 2])
            path.write_bytes({"flipped": bytes(data), "cut": half, "gone": b""}[damage])
        (final,) = llm.generate([PROMPT], GREEDY)
        assert final.token_ids == cold and final.error is None and final.cached_tokens < 68
        assert llm.engine.parts.state is not None and llm.engine.parts.state.counters.loads_failed == 1
        forget_device(llm)
        assert llm.generate([PROMPT], GREEDY)[0].token_ids == cold


def test_another_model_on_the_folder_is_a_miss_and_keeps_the_texts(tmp_path: Path) -> None:
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        llm.generate([PROMPT], GREEDY)
        llm.state_store.put(PROMPT, {"name": "prompt", "durable": True})
    with LLM(**TINY, state_dir=str(tmp_path), seed=1) as other:
        (final,) = other.generate([PROMPT], GREEDY)
        assert final.cached_tokens == 0 and other.state_store.get("prompt", "default") == PROMPT
        assert any("another model" in warning for warning in other.state_store.warnings)
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        assert llm.generate([PROMPT], GREEDY)[0].hit_tokens_by_tier == {"disk": 68}


@needs_server
def test_two_engines_share_a_server_and_outlive_it(cold: list[int], tmp_path: Path) -> None:
    with running_server(tmp_path) as (url, server), LLM(**TINY, state_remote=url) as first:
        assert first.generate([PROMPT], GREEDY)[0].token_ids == cold
        settle(first)
        with LLM(**TINY, state_remote=url) as second:
            (shared,) = second.generate([PROMPT], GREEDY)
            assert shared.token_ids == cold and shared.hit_tokens_by_tier == {"remote": 68}
            forget_device(second)
            server.kill()
            server.wait()
            for _ in range(3):
                (alone,) = second.generate([PROMPT], GREEDY)
                assert alone.token_ids == cold and alone.error is None
                forget_device(second)


KILLED = """
import os, signal, sys
from tests.engine.test_state_exact import GREEDY, PROMPT, TINY, settle
from nanovllm import LLM
llm = LLM(**TINY, state_dir=sys.argv[1])
llm.generate([PROMPT], GREEDY)
settle(llm)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_and_started_again_it_finds_what_was_written(cold: list[int], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        (final,) = llm.generate([PROMPT], GREEDY)
        assert final.token_ids == cold and final.hit_tokens_by_tier == {"disk": 68}


def test_aborted_while_it_loads_from_disk(cold: list[int], tmp_path: Path) -> None:
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        llm.generate([PROMPT], GREEDY)
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        for _ in range(3):
            request_id = llm.engine.add_request(PROMPT, GREEDY)
            llm.engine.step()
            llm.engine.abort(request_id)
            llm.engine.flush()
            assert not llm.engine.parts.state.block_manager.used_block_ids  # type: ignore[union-attr]
        assert llm.generate([PROMPT], GREEDY)[0].token_ids == cold


def test_a_folder_has_one_owner_and_a_closed_engine_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        store = llm.state_store
        kept = store.put("text")
        with monkeypatch.context() as patched, pytest.raises(StateFolderError, match="in use by process"):
            patched.delattr("nanovllm.engine.build.load_model_files")  # refused before anything is loaded
            LLM(**TINY, state_dir=str(tmp_path))
    for verb in (lambda: store.put("text"), lambda: store.get(kept), lambda: store.put_later("text")):
        with pytest.raises(EngineClosedError):
            verb()
    store.close()
    with pytest.raises(EngineClosedError):
        llm.state_store  # noqa: B018
    with LLM(**TINY, state_dir=str(tmp_path)):
        pass


@pytest.mark.parametrize(
    "settings", [{"state_host_memory": "much"}, {"state_disk_quota": 0}, {"state_dir": 7}, {"state_load": "maybe"}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        LLM(**{**TINY, **settings})
    assert refused.value.param == next(iter(settings))


def test_without_settings_nothing_is_copied_and_names_work() -> None:
    with LLM(**{**TINY, "state_load": "auto"}) as llm:
        llm.generate([PROMPT], GREEDY)
        state_id = llm.state_store.put(PROMPT[:16], {"name": "opening"})
        assert llm.state_store.pin(state_id).ok and llm.state_store.unpin(state_id).ok
        assert llm.engine.parts.state.facts()["spilled_blocks"] == 0  # type: ignore[union-attr]


def test_after_a_restart_it_knows_what_things_cost_and_what_was_pinned(cold: list[int], tmp_path: Path) -> None:
    settings = {**TINY, "state_load": "auto", "state_dir": str(tmp_path)}
    with LLM(**settings) as llm:
        llm.generate([PROMPT], GREEDY)
        state_id = llm.state_store.put(PROMPT[:64], {"name": "opening", "durable": True})
        assert llm.state_store.pin(state_id, ttl=1000).ok and llm.state_store.pin(state_id, "disk").ok
    with LLM(**settings) as llm:
        store = llm.state_store
        assert llm.engine.parts.state is not None and llm.engine.parts.state.costs.is_known and not store.warnings
        story = store.explain(state_id)
        assert {pin["tier"] for pin in story.facts["pins"]} == {"device", "disk"}
        assert [receipt.action for receipt in story.receipts] == ["put", "pin", "migrate", "pin", "pin", "pin"]
        (final,) = llm.generate([PROMPT], GREEDY)
        assert final.token_ids == cold
        load = next(r for r in reversed(store.plane.history.recent) if r.action == "load")
        assert load.detail["estimated_compute_ms"] > 0 and "not known" not in load.detail["decision"]
        (lease,) = llm.engine.scheduler.kv.block_manager.leases  # type: ignore[attr-defined]
        assert len(lease.block_ids) == 16


@pytest.mark.parametrize("mode", ["off", "observe", "reuse"])
def test_tiers_that_will_keep_no_kv_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    with LLM(**TINY, state_dir=str(tmp_path), prefix_mode=mode) as llm:
        assert llm.state_store.get(llm.state_store.put("a text")) == "a text"
    assert ("keep no KV" in caplog.text) == (mode != "reuse")
