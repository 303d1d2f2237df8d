"""The cells of the state matrix: what is kept, in which tier it is looked for, and what happens to it in between.

Each cell has a namespace of its own, so that no cell can find what another one left. What a cell asks are prompts
that begin with the first h tokens of what was kept and then go on otherwise; the answers of an engine that reuses
nothing are computed once for all cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exact_harness import greedy, sharing_model

from nanovllm import LLM
from nanovllm.engine.knowledge_prompt import ids_of, path_of
from nanovllm.engine.parts import RequestArgs
from nanovllm.state.objects import Document, Session, Storable
from tests.state.servers import running_server

ALL_BYTES = 1 << 40
NUM_TOKENS, NUM_SAID = 3, 2  # asked of every prompt; blocks that a session's answer fills
Restored = tuple[list[int], dict[str, int]]


@dataclass
class Kept:
    """Something to keep: its tokens, the object, and how many of the tokens are the model's own answer."""

    kind: str
    tokens: list[int]
    obj: Storable
    num_said: int = 0
    cold: dict[int, list[int]] = field(default_factory=dict)

    def prompt(self, hit: int) -> list[int]:
        """A prompt that shares its first `hit` tokens with what is kept; all of it, and nothing else, where -1."""
        if hit < 0:
            return self.tokens
        other = self.tokens[hit % len(self.tokens)] + 1
        return self.tokens[:hit] + [(other + 3 * i) % 250 for i in range(5)]

    def lengths(self, size: int, every_token: bool) -> list[int]:
        """All of them, or each number of whole blocks and some tails."""
        end = len(self.tokens)
        some = {*range(0, end, size), 1, size - 1, size + 1, end - size - 1, end - 1, end}
        return [-1, *(range(end + 1) if every_token else sorted(some))]


@dataclass
class World:
    """A model without reuse, and all that the cells keep."""

    llm: LLM
    block_size: int
    every_token: bool
    num_cells: int = 0

    def __post_init__(self) -> None:
        size = self.block_size
        plain = [(7 * i + i * i) % 250 for i in range(8 * size + 2)]
        document, path = path_of(self.llm.tokenizer, Document("Opens at 8. " * (size // 4), (), "S."), "lib@1", 10**6)
        asked = [(11 * i + 5) % 250 for i in range(3 * size + 1)]
        said = self.answer(asked, NUM_SAID * size)
        messages = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": "said"}]
        self.kept = {
            "kv": Kept("kv", plain, plain),
            "knowledge": Kept("knowledge", ids_of(path), document),
            "session": Kept("session", asked + said, Session(messages, asked + said), len(said)),
        }

    def answer(self, prompt: list[int], max_tokens: int = NUM_TOKENS) -> list[int]:
        """What a cold run says."""
        (final,) = self.llm.generate([prompt], greedy(max_tokens))
        assert final.cached_tokens == 0
        return final.token_ids

    def expected(self, kept: Kept, hit: int) -> list[int]:
        if hit not in kept.cold:
            kept.cold[hit] = self.answer(kept.prompt(hit))
        return kept.cold[hit]


@dataclass
class Stage:
    """Engines with one tier beneath the pool (none for `device`), over the weights of a world."""

    world: World
    tier: str
    settings: dict[str, dict[str, Any]]  # of the engine at `home`, and of another one elsewhere
    engines: dict[str, LLM] = field(default_factory=dict)

    def engine(self, where: str = "home") -> LLM:
        if where not in self.engines:
            size, blocks = self.world.block_size, 256 if self.world.every_token else 64  # a cell's prompts, all of them
            common: dict[str, Any] = {"prefix_mode": "reuse", "block_size": size, "max_model_len": 40 * size}
            common |= {"num_blocks": blocks, "kv_memory": None, "check_invariants": True, "state_load": "always"}
            self.engines[where] = sharing_model(self.world.llm, **common, **self.settings[where])
        return self.engines[where]

    def restart(self) -> None:
        self.engines.pop("home").close()

    def keep(self, kept: Kept, namespace: str) -> str:
        """Compute it, put the object, and wait until the tier below has what it gets."""
        llm, prompt = self.engine(), kept.tokens[: len(kept.tokens) - kept.num_said]
        request = RequestArgs(prompt=prompt, sampling_params=greedy(kept.num_said or 1), namespace=namespace)
        (final,) = llm.engine.generate([request])
        assert final.token_ids == (kept.tokens[len(prompt) :] or final.token_ids) and not final.cached_tokens
        state_id = llm.state_store.put(kept.obj, {"kind": kept.kind, "namespace": namespace})
        settle(llm)
        return state_id

    def forget_device(self, llm: LLM) -> None:
        """Nothing is found on the device any more, unless that is the tier."""
        settle(llm)
        if self.tier != "device":
            device = llm.engine.parts.state.device  # type: ignore[union-attr]
            assert all(device.discard(digest) for digest in list(device.manager.hash_to_block_id))


def settle(llm: LLM) -> None:
    """Idle steps until nothing waits to be written."""
    while not llm.engine.scheduler.kv.is_settled():
        llm.engine.step()


@contextmanager
def stage(world: World, tier: str, folder: Path) -> Iterator[Stage]:
    """Both engines' own host memory, folder, or database of one server."""
    with ExitStack() as stack:
        url = stack.enter_context(running_server(folder))[0][:-1] if tier == "remote" else ""
        settings: dict[str, Callable[[int], dict[str, Any]]] = {
            "device": lambda _: {},
            "host": lambda _: {"state_host_memory": "64MiB"},
            "disk": lambda number: {"state_dir": str(folder / str(number))},
            "remote": lambda number: {"state_remote": f"{url}{number}"},
        }
        one = Stage(world, tier, {where: settings[tier](i) for i, where in enumerate(("home", "elsewhere"))})
        yield one
        for llm in one.engines.values():
            llm.close()
