"""Log points and stop watches in a BlockManager, switched on one by one.

What it is: wrappers that stand in front of single methods of one manager. What it
knows nothing about: what the methods do. Invariants: what is off is the method itself,
so it costs nothing; a wrapper passes arguments, result and exceptions on unchanged; a
line holds ids and counts, never tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from nanovllm.core.clock import Clock
from nanovllm.core.events import BLOCK_CALLS
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

logger = logging.getLogger("nanovllm")


class BlockTimes:
    """Nanoseconds spent in each of BLOCK_CALLS since the last `take`."""

    def __init__(self, manager: BlockManager, clock: Clock) -> None:
        """Puts a stop watch in front of each of the four methods of `manager`."""
        self._clock = clock
        self._spent_ns = dict.fromkeys(BLOCK_CALLS, 0)
        for name in BLOCK_CALLS:
            setattr(manager, name, self._timed(name, getattr(manager, name)))

    def take(self) -> tuple[int, ...]:
        """What was spent, in the order of BLOCK_CALLS; counts from zero again."""
        spent_ns, self._spent_ns = self._spent_ns, dict.fromkeys(BLOCK_CALLS, 0)
        return tuple(spent_ns.values())

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            start_ns = self._clock.now_ns()
            try:
                return method(*args, **options)
            finally:
                self._spent_ns[name] += self._clock.now_ns() - start_ns

        return call


def log_calls(manager: BlockManager, names: Iterable[str]) -> None:
    """From now on each call of these methods is a line of the package's log:

    can_allocate req-1 blocks=3 free=10 -> True
    """
    for name in names:
        setattr(manager, name, _logged(manager, name, getattr(manager, name)))


def _logged(manager: BlockManager, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(seq: Sequence, *args: Any, **options: Any) -> Any:
        held = len(seq.block_table)
        result = method(seq, *args, **options)
        blocks = seq.num_blocks if name == "can_allocate" else max(held, len(seq.block_table))
        answer = "" if result is None else f" -> {result}"
        logger.info("%s %s blocks=%d free=%d%s", name, seq.request_id, blocks, len(manager.free_block_ids), answer)
        return result

    return call
