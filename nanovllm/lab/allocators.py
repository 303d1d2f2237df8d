"""Ways to give KV slots to requests: contiguous reservations, and pages as the engine gives them.

What it is: four allocators behind one shape, counted in token slots. What it knows nothing
about: arrivals, time. The paged one is the engine's `BlockManager`, prefix sharing off.

    reserve-max    one piece for the longest request the model allows, whatever comes
    reserve-exact  one piece for prompt and output, as if the output's length were known (an oracle)
    reserve-guess  one piece for the prompt and a guess of the output; outgrown, it is lengthened or moved
    paged          blocks for the known tokens, one more when full; who enters leaves one free for each that runs
    paged, no headroom    the same, but whoever fits enters

Invariants: nobody holds less than its tokens; what is released was held; slots held and slots free are all slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.lab.first_fit import FirstFit

RESERVATIONS = ("reserve-max", "reserve-exact", "reserve-guess")


class Allocator(Protocol):
    """What the replay asks. `known` is a request's tokens now, `final` those of its last step."""

    name: str
    capacity: int

    def can_ever(self, known: int, final: int) -> bool:
        """Whether it could be served with nobody else there."""
        ...

    def admit(self, key: str, known: int, final: int) -> bool:
        """Take it in; False where there is no room for it now."""
        ...

    def grow(self, key: str, known: int) -> bool:
        """Let it hold `known` tokens; False where there is no room."""
        ...

    def release(self, key: str) -> None:
        """It ended, or gives way."""
        ...

    def held(self, key: str) -> int:
        """Slots it has, filled or not."""
        ...

    def stranded(self, known: int, final: int) -> int:
        """Free slots that would suffice for this request, but lie in holes that are too short for it."""
        ...

    def headroom(self, known: int) -> int:
        """Free slots that are kept for growth, where without that this request would fit."""
        ...


@dataclass
class _Piece:
    start: int
    length: int


class Contiguous:
    """One piece of a contiguous space per request, by one of RESERVATIONS."""

    def __init__(self, name: str, capacity: int, *, max_len: int, guess: int) -> None:
        self.name, self.capacity = name, capacity
        self._max_len, self._guess = max_len, guess
        self._space = FirstFit(capacity)
        self._pieces: dict[str, _Piece] = {}
        self.num_outgrown = self.num_moved_tokens = 0

    def can_ever(self, known: int, final: int) -> bool:
        """The reservation has to fit the space, and the request the longest reservation where that is fixed."""
        is_too_long = self.name == "reserve-max" and final > self._max_len
        return final <= self.capacity and self._need(known, final) <= self.capacity and not is_too_long

    def admit(self, key: str, known: int, final: int) -> bool:
        """First fit."""
        return self._place(key, self._need(known, final))

    def grow(self, key: str, known: int) -> bool:
        """Within the reservation for nothing; an outgrown one is lengthened in place, or moved to a longer hole."""
        piece = self._pieces[key]
        if known <= piece.length:
            return True
        self.num_outgrown += 1
        wanted = self._need(known, known)
        if self._space.extend(piece.start, wanted - piece.length):
            piece.length = wanted
            return True
        return self._move(key, wanted, known - 1)

    def release(self, key: str) -> None:
        """The whole piece, used or not."""
        self._space.free(self._pieces.pop(key).start)

    def held(self, key: str) -> int:
        """The reservation."""
        return self._pieces[key].length

    def stranded(self, known: int, final: int) -> int:
        """All free slots, where their sum is enough and no hole is."""
        need = self._need(known, final)
        return self._space.num_free if self._space.longest_hole < need <= self._space.num_free else 0

    def headroom(self, known: int) -> int:
        """None is kept: who outgrows its piece takes what is there."""
        return 0

    def _need(self, known: int, final: int) -> int:
        if self.name == "reserve-max":
            return self._max_len
        return final if self.name == "reserve-exact" else min(known + self._guess, self.capacity)

    def _place(self, key: str, length: int) -> bool:
        start = self._space.allocate(length)
        if start is not None:
            self._pieces[key] = _Piece(start, length)
        return start is not None

    def _move(self, key: str, length: int, num_tokens: int) -> bool:
        """Copy its tokens to a hole; both places are taken while it is copied."""
        old = self._pieces[key]
        if not self._place(key, length):
            return False
        self._space.free(old.start)
        self.num_moved_tokens += num_tokens
        return True


class Paged:
    """The engine's BlockManager. It grows block by block, and admits with one free block left for each that runs.

    `keeps_headroom` False: it admits whoever fits. The engine's scheduler also counts with what it has seen requests
    grow, and with a watermark (1 % of the blocks); both are left out.
    """

    def __init__(self, num_blocks: int, block_size: int, *, keeps_headroom: bool = True) -> None:
        self.name = "paged" if keeps_headroom else "paged, no headroom"
        self.capacity, self._keeps_headroom = num_blocks * block_size, keeps_headroom
        self._manager = BlockManager(num_blocks, block_size, prefix_mode="off")
        self._sequences: dict[str, Sequence] = {}

    def can_ever(self, known: int, final: int) -> bool:
        """Its blocks are there."""
        return -(-final // self._manager.block_size) <= self._manager.num_blocks

    def admit(self, key: str, known: int, final: int) -> bool:
        """`can_allocate`, then `allocate`: the known tokens and no more."""
        seq = Sequence([0] * known, SamplingParams(), self._manager.block_size, request_id=key)
        if not self._manager.can_allocate(seq, headroom=self._kept_blocks()):
            return False
        self._manager.allocate(seq)
        self._sequences[key] = seq
        return True

    def grow(self, key: str, known: int) -> bool:
        """`can_append`, then `may_append`."""
        seq = self._sequences[key]
        while seq.num_tokens < known:
            seq.append_token(0)
        if not self._manager.can_append(seq):
            return False
        self._manager.may_append(seq)
        return True

    def release(self, key: str) -> None:
        """`deallocate`."""
        self._manager.deallocate(self._sequences.pop(key))

    def held(self, key: str) -> int:
        """Slots of its blocks."""
        return len(self._sequences[key].block_table) * self._manager.block_size

    def stranded(self, known: int, final: int) -> int:
        """Any block will do: none ever is."""
        return 0

    def headroom(self, known: int) -> int:
        """Whole blocks."""
        free = len(self._manager.free_block_ids)
        fits = -(-known // self._manager.block_size) <= free
        return min(free, self._kept_blocks()) * self._manager.block_size if fits else 0

    def _kept_blocks(self) -> int:
        return len(self._sequences) if self._keeps_headroom else 0
