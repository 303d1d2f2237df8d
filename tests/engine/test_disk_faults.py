"""S6, S8, S10, S13 under a real engine: what a folder does to it costs time; no token and no block of the pool."""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.errors import StateBundleError, StateRefusedError
from nanovllm.state.tiers.folder import Folder, io_errors
from tests.engine.test_state_exact import GREEDY, PROMPT, TINY, cold, forget_device, settle  # noqa: F401

OTHERS = [[i, *PROMPT[:60]] for i in range(6)]


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, action: str, code: int) -> Iterator[None]:
    """That call of every folder raises, as the kernel would have it."""

    def raises(self: Folder, *_: Any) -> None:
        with io_errors(self.role, action):
            raise OSError(code, "as told")

    with monkeypatch.context() as patched:
        patched.setattr(Folder, action, raises)
        yield


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EIO),
        ("write", errno.EROFS),
        ("create", errno.EMFILE),
        ("read", errno.EIO),
    ],
)
def test_a_folder_that_fails_costs_time_and_no_token(
    cold: list[int],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    code: int,
) -> None:
    with LLM(**TINY, state_dir=str(tmp_path)) as llm:
        if action == "read":
            llm.generate([PROMPT], GREEDY)
            forget_device(llm)
        first = None
        with failing(monkeypatch, action, code):
            for _ in range(6):
                assert llm.generate([PROMPT], GREEDY)[0].token_ids == cold
                first = first or [out.token_ids for out in llm.generate(OTHERS, GREEDY)]
                forget_device(llm)
            disk = llm.state_store.top()["tiers"]["disk"]
            assert disk["failures"] >= 1 and disk["corrupt"] == 0
            if action == "read":
                assert disk["breaker"]["reads"] == "open" and disk["kinds"]["kv"]["failures"] == 5
            else:
                assert disk["breaker"]["writes"] == "open" and disk["bytes_written"] == 0
                with pytest.raises(StateRefusedError):
                    llm.state_store.put("a text that is to be kept")
        place = llm.state_store.plane.places["disk"]
        for breaker in (place.reads, place.writes):
            breaker._cooldown_ns = 0  # thirty seconds have passed
        for _ in range(2):
            assert llm.generate([PROMPT], GREEDY)[0].token_ids == cold
            forget_device(llm)
        final = llm.generate([PROMPT], GREEDY)[0]
        assert final.token_ids == cold and final.hit_tokens_by_tier == {"disk": 68}, "used again"
        assert [out.token_ids for out in llm.generate(OTHERS, GREEDY)] == first


def test_each_of_three_restarts_finds_what_the_last_one_had(cold: list[int], tmp_path: Path) -> None:  # noqa: F811
    """S10; and what was put by name is there, too."""
    reusable = 68 + sum(60 // 4 * 4 for _ in OTHERS)
    for restart in range(4):
        with LLM(**TINY, state_dir=str(tmp_path)) as llm:
            found = 0
            for prompt in (PROMPT, *OTHERS):
                (final,) = llm.generate([prompt], GREEDY)
                found += final.cached_tokens
                forget_device(llm)
                assert prompt is not PROMPT or final.token_ids == cold
            assert restart == 0 or found >= 0.95 * reusable
            if restart == 0:
                llm.state_store.put("The library opens at 8.", {"name": "library"})
            assert llm.state_store.get("library", "default") == "The library opens at 8."
            settle(llm)


def test_a_damaged_bundle_leaves_the_pool_as_it_was(tmp_path: Path) -> None:
    """S13: the block pool's bytes, the books and the folder are the same before and after 100 damaged imports."""
    with LLM(**TINY, state_dir=str(tmp_path / "a")) as llm:
        state_id = llm.state_store.put(PROMPT, {"name": "prompt"})
        llm.generate([PROMPT], GREEDY)
        settle(llm)
        bundle = llm.state_store.export(state_id)
    with LLM(**TINY, state_dir=str(tmp_path / "b")) as llm:
        llm.generate([OTHERS[0]], GREEDY)
        settle(llm)
        before, rng = picture(llm, tmp_path / "b"), random.Random(13)
        for i in range(100):
            data = bytearray(bundle)
            if i % 2:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                del data[rng.randrange(len(data)) :]
            with pytest.raises(StateBundleError):
                llm.state_store.import_(bytes(data))
        assert picture(llm, tmp_path / "b") == before
        taken = llm.state_store.import_(bundle)
        assert llm.state_store.get(taken) == PROMPT
        forget_device(llm)
        assert llm.generate([PROMPT], GREEDY)[0].hit_tokens_by_tier == {"host": 68}


def picture(llm: LLM, folder: Path) -> tuple[str, Any, dict[str, str]]:
    """The pool's bytes, who can be found in it, and every file of the folder."""
    state = llm.engine.parts.state
    assert state is not None
    pool = hashlib.sha256(state.device.memory.pool.numpy().tobytes()).hexdigest()
    files = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.seg")}
    texts = {str(p): "" for p in (folder / "texts").iterdir()}
    return pool, dict(state.device.manager.hash_to_block_id), {**files, **texts}
