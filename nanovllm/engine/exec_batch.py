"""ExecBatch: exactly what one step runs, as plain arrays; ExecResult: what comes back; Runner: who does it.

What it is: the seam to the runner. Arrays go in, tokens come out, so a runner can
sit in another process, be captured, or be simulated. What it knows nothing about:
Sequence objects after `build`, torch, text.

S sequences, N = sum(query_lens) tokens to compute, M = sequences that sample.
Row i computes tokens [context_lens[i] - query_lens[i], context_lens[i]) of its sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.grammar import Mask
from nanovllm.engine.sampling_batch import SamplingBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ExecutionError, InvalidRequestError

Ints = NDArray[np.int64]
NO_TOKEN = -1  # in place of a sampled token: the row's logits were no numbers


@dataclass(frozen=True)
class ExecBatch:
    """One step's work. Block tables are padded with block 0, which is never read past context_lens."""

    token_ids: Ints  # [N]
    positions: Ints  # [N]
    query_lens: Ints  # [S]
    context_lens: Ints  # [S]
    block_tables: Ints  # [S, max_blocks]
    samples: NDArray[np.bool_]  # [S]
    sampling: SamplingBatch  # M rows

    @classmethod
    def build(cls, seqs: list[Sequence], masks: Mapping[Sequence, Mask] | None = None) -> ExecBatch:
        """The arrays of the scheduled `seqs`, and which tokens the grammars of some of them allow."""
        starts = np.array([s.num_cached_tokens for s in seqs], np.int64)
        query_lens = np.array([s.num_scheduled_tokens for s in seqs], np.int64)
        tokens = [s.token_ids[s.num_cached_tokens : s.num_cached_tokens + s.num_scheduled_tokens] for s in seqs]
        samples = np.array([samples_next(s) for s in seqs], np.bool_)
        return cls(
            token_ids=np.fromiter(chain.from_iterable(tokens), np.int64, int(query_lens.sum())),
            positions=_ranges(starts, query_lens),
            query_lens=query_lens,
            context_lens=starts + query_lens,
            block_tables=_padded([s.block_table for s in seqs]),
            samples=samples,
            sampling=SamplingBatch.build([s for s, wanted in zip(seqs, samples, strict=True) if wanted], masks),
        )

    def to_wire(self) -> dict[str, Any]:
        """Plain data for msgpack."""
        return {f.name: _packed(getattr(self, f.name)) for f in fields(self) if f.name != "sampling"} | {
            "sampling": {f.name: _packed(getattr(self.sampling, f.name)) for f in fields(self.sampling)}
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ExecBatch:
        """The batch that `to_wire` described. Raises InvalidRequestError on anything else."""
        try:
            arrays = {f.name: _unpacked(wire[f.name]) for f in fields(cls) if f.name != "sampling"}
            sampling = {f.name: _unpacked(wire["sampling"][f.name]) for f in fields(SamplingBatch)}
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(f"Malformed batch on the wire: {error}.", param="batch") from error
        return cls(**arrays, sampling=SamplingBatch(**sampling))


@dataclass(frozen=True)
class ExecResult:
    """The sampled tokens of the M sampling rows, and log-probabilities where a row asked for them.

    A row without a finite logit to choose holds NO_TOKEN: it fails, and its neighbours do not.
    `logprobs[i]` is None or a list of (token_id, logprob), the chosen token first, then the top ones.
    """

    token_ids: Ints  # [M]
    logprobs: list[list[tuple[int, float]] | None]

    def check(self, num_rows: int) -> None:
        """Raise ExecutionError unless there is a token for each of `num_rows` rows, which are told apart by order."""
        if self.token_ids.shape != (num_rows,) or len(self.logprobs) != num_rows:
            raise ExecutionError(f"{len(self.token_ids)} tokens came back for {num_rows} rows.")

    def to_wire(self) -> dict[str, Any]:
        """Plain data for msgpack."""
        return {"token_ids": _packed(self.token_ids), "logprobs": self.logprobs}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ExecResult:
        """The result that `to_wire` described. Raises InvalidRequestError on anything else."""
        try:
            logprobs = [row and [(int(t), float(p)) for t, p in row] for row in wire["logprobs"]]
            return cls(_unpacked(wire["token_ids"]), logprobs)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(f"Malformed result on the wire: {error}.", param="result") from error


class Runner(Protocol):
    """What the engine needs of whatever executes its steps."""

    def launch(self, batch: ExecBatch) -> object:
        """Start a step; the handle is opaque."""
        ...

    def collect(self, handle: object) -> ExecResult:
        """Wait for a launched step and return one token per sampling row."""
        ...


def samples_next(seq: Sequence) -> bool:
    """True where this step computes the last known token of a sequence that wants another one."""
    return seq.num_scheduled_tokens == seq.num_remaining_tokens and not seq.prefill_only


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenated ranges [start, start + length)."""
    offsets = np.repeat(starts - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return np.arange(int(lengths.sum())) + offsets


def _padded(rows: list[list[int]]) -> Ints:
    width = max(map(len, rows))
    out = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _packed(array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


def _unpacked(wire: dict[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(wire["dtype"])
    if dtype.kind not in "iufb":
        raise ValueError(f"dtype {dtype} is not plain numbers")
    return np.frombuffer(wire["data"], dtype).reshape(wire["shape"]).copy()  # its own, and writable
