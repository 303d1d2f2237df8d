"""The prefix-hit probe: how much of what enters has been seen before, as a prefix. It observes and changes nothing.

What it is: for each block size and cache bound, a shadow index of block digests and a
count of prompt tokens that it holds already. What it knows nothing about: engines,
pools, time. What it makes is a potential-overlap signal: each figure says so, and
none is ever called more than that, because whether a hit is worth its price depends on what is resident then,
on what moving it costs, and on what the scheduler would have done meanwhile.

What it assumes, and therefore overstates: a prefix can be found from the moment its request entered.
What the engine's prefix_mode `observe` counts is the same for requests that come one after the other.

Invariants: the block with the last prompt token never counts (one token is always computed); namespaces and
roots share nothing; a bounded cache never overlaps more than a larger one, nor any more than the infinite one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.core.digest import Digest, block_digest, root_digest

LABEL = "observe-only"
STATEMENT = "potential-overlap signal, not a realised gain"
ALL = "*"  # the namespace of figures over all namespaces
MAX_INFINITE_BLOCKS = 2**22  # about 600 MB of digests: an infinite cache stops learning here and says so


@dataclass(frozen=True)
class OverlapFigure:
    """One count, with everything needed to read it rightly. `capacity_blocks` None: an infinite cache."""

    block_size: int
    capacity_blocks: int | None
    namespace: str
    requests: int
    requests_with_overlap: int
    tokens: int
    overlap_tokens: int
    is_lower_bound: bool = False

    @property
    def overlap_share(self) -> float:
        """Of the prompt tokens."""
        return self.overlap_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figure as plain data; label and statement stand in it, so that no copy of it loses them."""
        return {
            "label": LABEL,
            "statement": STATEMENT,
            "block_size": self.block_size,
            "capacity_blocks": self.capacity_blocks,
            "namespace": self.namespace,
            "requests": self.requests,
            "requests_with_overlap": self.requests_with_overlap,
            "tokens": self.tokens,
            "overlap_tokens": self.overlap_tokens,
            "overlap_share": round(self.overlap_share, 6),
            "is_lower_bound": self.is_lower_bound,
        }

    def __str__(self) -> str:
        cache = "infinite" if self.capacity_blocks is None else f"LRU {self.capacity_blocks:,} blocks"
        least = "at least " if self.is_lower_bound else ""
        space = "all namespaces" if self.namespace == ALL else f"namespace {self.namespace or '(default)'}"
        return (
            f"blocks of {self.block_size}, {cache}, {space}: {least}"
            f"{self.overlap_tokens:,} of {self.tokens:,} prompt tokens ({self.overlap_share:.1%}) "
            f"[{LABEL}: {STATEMENT}]"
        )


@dataclass
class _Count:
    """What one namespace adds up to."""

    requests: int = 0
    requests_with_overlap: int = 0
    tokens: int = 0
    overlap_tokens: int = 0

    def add(self, tokens: int, overlap_tokens: int) -> None:
        self.requests += 1
        self.requests_with_overlap += overlap_tokens > 0
        self.tokens += tokens
        self.overlap_tokens += overlap_tokens


class ShadowCache:
    """The digests of the last `capacity` blocks used; all of them where that is None."""

    def __init__(self, capacity: int | None, limit: int = MAX_INFINITE_BLOCKS) -> None:
        self.capacity, self.is_truncated = capacity, False
        self._limit = limit
        self._blocks: OrderedDict[Digest, None] = OrderedDict()  # least recently used first

    def count_hits(self, digests: Sequence[Digest]) -> int:
        """How many of them, from the first on, are held."""
        return next((i for i, digest in enumerate(digests) if digest not in self._blocks), len(digests))

    def use(self, digests: Sequence[Digest]) -> None:
        """Take in a whole chain. Its end is the least recent: suffixes go before the prefixes they need."""
        if self.capacity is None:
            self._learn(digests)
            return
        for digest in reversed(digests):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)

    def _learn(self, digests: Sequence[Digest]) -> None:
        if len(self._blocks) + len(digests) > self._limit:
            self.is_truncated = True
        else:
            self._blocks.update(dict.fromkeys(digests))


class _Level:
    """One block size: digests are made once, for caches of several bounds."""

    def __init__(self, block_size: int, unit_tokens: int, capacities: Iterable[int | None]) -> None:
        self.block_size, self._units = block_size, block_size // unit_tokens
        self.caches = [ShadowCache(capacity) for capacity in capacities]
        self._counts: list[dict[str, _Count]] = [{} for _ in self.caches]

    def entered(self, units: Sequence[int], num_tokens: int, namespace: str, root: Digest) -> None:
        digests = self._digests(units, num_tokens, root)
        matchable = digests[: (num_tokens - 1) // self.block_size]
        for cache, counts in zip(self.caches, self._counts):
            hits = cache.count_hits(matchable)
            counts.setdefault(namespace, _Count()).add(num_tokens, hits * self.block_size)
            cache.use(digests)

    def finished(self, units: Sequence[int], num_tokens: int, root: Digest) -> None:
        digests = self._digests(units, num_tokens, root)
        for cache in self.caches:
            cache.use(digests)

    def figures(self) -> Iterator[OverlapFigure]:
        for cache, counts in zip(self.caches, self._counts):
            total = _Count(*(sum(getattr(c, name) for c in counts.values()) for name in vars(_Count())))
            for namespace, count in [*sorted(counts.items()), (ALL, total)]:
                yield OverlapFigure(
                    self.block_size, cache.capacity, namespace, **vars(count), is_lower_bound=cache.is_truncated
                )

    def _digests(self, units: Sequence[int], num_tokens: int, parent: Digest) -> list[Digest]:
        """One digest per full block."""
        digests = []
        for i in range(num_tokens // self.block_size):
            parent = block_digest(parent, units[i * self._units : (i + 1) * self._units])
            digests.append(parent)
        return digests


class PrefixProbe:
    """Put it beside an engine (`engine.observers.add(probe)`), or feed it a recorded trace.

    `unit_tokens` is how many tokens one number of the input stands for: 1 for token ids, 512 for traces that
    name blocks of 512. Block sizes must be multiples of it; `capacities` are LRU bounds in blocks, None for no bound.
    """

    def __init__(
        self, block_sizes: Iterable[int] = (16,), capacities: Iterable[int | None] = (None,), unit_tokens: int = 1
    ) -> None:
        sizes, bounds = list(dict.fromkeys(block_sizes)), list(dict.fromkeys(capacities))
        if not sizes or not bounds or any(size < 1 or size % unit_tokens for size in sizes):
            raise ValueError(f"block sizes must be multiples of {unit_tokens}, not {sizes}")
        if any(bound is not None and bound < 1 for bound in bounds):
            raise ValueError(f"capacities must be at least 1 block, not {bounds}")
        self._unit_tokens = unit_tokens
        self._levels = [_Level(size, unit_tokens, bounds) for size in sizes]

    def entered(
        self,
        token_ids: Sequence[int],
        namespace: str = "",
        root: Digest | None = None,
        *,
        num_tokens: int | None = None,
    ) -> None:
        """A request entered. `num_tokens` where the last unit is not full."""
        root, num_tokens = self._defaults(token_ids, namespace, root, num_tokens)
        for level in self._levels:
            level.entered(token_ids, num_tokens, namespace, root)

    def finished(self, token_ids: Sequence[int], namespace: str = "", root: Digest | None = None) -> None:
        """A request finished: prompt and completion may be the prefix of what comes."""
        root, num_tokens = self._defaults(token_ids, namespace, root, None)
        for level in self._levels:
            level.finished(token_ids, num_tokens, root)

    def figures(self) -> list[OverlapFigure]:
        """One per block size, bound and namespace, and one over all namespaces (`*`)."""
        return [figure for level in self._levels for figure in level.figures()]

    def _defaults(
        self, units: Sequence[int], namespace: str, root: Digest | None, num_tokens: int | None
    ) -> tuple[Digest, int]:
        root = root_digest({"namespace": namespace}) if root is None else root
        return root, len(units) * self._unit_tokens if num_tokens is None else num_tokens


def total(figures: Iterable[OverlapFigure], block_size: int, capacity_blocks: int | None = None) -> OverlapFigure:
    """The figure over all namespaces. Raises StopIteration where the probe was not asked for it."""
    wanted = (block_size, capacity_blocks, ALL)
    return next(f for f in figures if (f.block_size, f.capacity_blocks, f.namespace) == wanted)
