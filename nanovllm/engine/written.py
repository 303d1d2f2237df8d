"""Written: who wants to know when a prompt's blocks have reached the tiers below.

What it is: questions that wait, answered between two steps. What it knows nothing about: who asks, tokens' text.
Invariants: asking holds up no step and moves no block but to the front of its queue; each question is answered
exactly once, whatever the answer to another raises: when nothing of it is on its way any more, or when its time is
over. "Written" is what the tier says of a write: for the disk the bytes are the kernel's, without fsync, as all KV is:
verified or a miss later.
A tier that others share is not waited for where there is another one: it may be slow, and they can wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from nanovllm.core.digest import Digest
from nanovllm.engine.write_behind import WriteBehind
from nanovllm.errors import InvalidRequestError, shown
from nanovllm.state.mover import MILLISECOND
from nanovllm.state.objects import DEFAULT_NAMESPACE, check_tokens
from nanovllm.state.store import StateStore

MAX_WAIT_S, DEFAULT_WAIT_S = 10.0, 2.0
SECOND_NS = 1_000_000_000
RootOf = Callable[[str, str], Digest]  # namespace, cache salt


@dataclass(frozen=True)
class Written:
    """Where the full blocks of a prompt lie. `tokens_by_tier`: of `num_tokens`, how many have KV in which tier.

    `is_complete`: every block that the pool has is in every tier that was waited for.
    """

    num_tokens: int
    tokens_by_tier: dict[str, int]
    is_complete: bool
    waited_ms: float


@dataclass(eq=False)
class Question:
    """One prompt's blocks; `waiting` are those on their way."""

    chain: tuple[Digest, ...]
    waiting: list[Digest]
    started_ns: int
    until_ns: int
    then: Callable[[Written], None]


class WrittenCalls:
    """The questions of one engine. `root_of`: where a namespace's digest chains begin, with a salt.

    `harmless`: counts and logs what an answer raises.
    """

    def __init__(
        self,
        store: StateStore,
        behind: WriteBehind,
        root_of: RootOf,
        harmless: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._store, self._behind, self._root_of, self._harmless = store, behind, root_of, harmless
        places = store.plane.places
        own = tuple(name for name in behind.tiers if not places[name].tier.shared)
        self._tiers = own or behind.tiers
        self._questions: list[Question] = []

    @property
    def is_empty(self) -> bool:
        """Nobody waits."""
        return not self._questions

    def ask(
        self,
        then: Callable[[Written], None],
        token_ids: list[int],
        namespace: str = DEFAULT_NAMESPACE,
        cache_salt: str = "",
        timeout: float = DEFAULT_WAIT_S,
    ) -> None:
        """Have `then` told where these tokens' blocks lie, once they are written or `timeout` seconds are over.

        Told at once where nothing is on its way. Raises InvalidRequestError on tokens or times that are none.
        """
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= MAX_WAIT_S:
            raise InvalidRequestError(f"timeout is 0 to {MAX_WAIT_S:g} s, not {shown(timeout)}.", param="timeout")
        plane = self._store.plane
        root = self._root_of(namespace, cache_salt)
        chain = plane.chain_of(check_tokens(token_ids, "token_ids"), namespace, root)
        now = plane.clock.now_ns()
        question = Question(chain, list(chain), now, now + int(timeout * SECOND_NS), then)
        if self._is_over(question, now):
            self._answer(question)
            return
        self._behind.hurry(question.waiting)
        self._questions.append(question)

    def poll(self) -> None:
        """Answer whom there is something to tell; between two steps."""
        if not self._questions:
            return
        now = self._store.plane.clock.now_ns()
        over = [question for question in self._questions if self._is_over(question, now)]
        self._questions = [question for question in self._questions if question not in over]
        self._answer_all(over)

    def close(self) -> None:
        """Nothing more will be written: everybody is told what there is."""
        questions, self._questions = self._questions, []
        self._answer_all(questions)

    def _answer_all(self, questions: list[Question]) -> None:
        for question in questions:
            with self._harmless():
                self._answer(question)

    def _is_over(self, question: Question, now: int) -> bool:
        question.waiting = [digest for digest in question.waiting if self._is_on_its_way(digest)]
        return not question.waiting or now >= question.until_ns

    def _is_on_its_way(self, digest: Digest) -> bool:
        return any(self._behind.is_on_its_way(digest, tier) for tier in self._tiers)

    def _answer(self, question: Question) -> None:
        plane, size = self._store.plane, self._store.plane.settings.block_size
        here = {name: sum(self._lies_in(d, name) for d in question.chain) for name in ("device", *plane.places)}
        has = plane.device.holds if plane.device is not None else lambda digest: False
        lacking = [d for d in question.chain if has(d) and not all(self._lies_in(d, tier) for tier in self._tiers)]
        waited_ms = (plane.clock.now_ns() - question.started_ns) / MILLISECOND
        tokens = {name: count * size for name, count in here.items() if count}
        question.then(Written(len(question.chain) * size, tokens, not lacking, waited_ms))

    def _lies_in(self, digest: Digest, name: str) -> bool:
        plane = self._store.plane
        if name == "device":
            return plane.device is not None and plane.device.holds(digest)
        entry = plane.catalog.entries.get(digest)
        return entry is not None and name in entry.tiers
