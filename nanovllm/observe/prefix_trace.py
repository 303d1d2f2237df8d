"""Prefix traces: requests as block identities and lengths, without any text. Read, probed, written.

What it is: JSON lines as Mooncake publishes them (kvcache-ai/Mooncake, FAST 2025):
`timestamp` ms, `input_length` tokens, `hash_ids`: one number per block of the prompt, the last one maybe
partial; equal numbers at equal positions behind an equal prefix mean equal content. `namespace` is ours and
optional. What it knows nothing about: what the blocks hold.

Invariants: a line that is not such a record is refused by its number; a file is read line by line and never
held whole; what `PrefixTraceWriter` writes, `read_prefix_trace` reads.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nanovllm.core.clock import Clock
from nanovllm.core.digest import Digest, block_digest
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.probe import PrefixProbe

MAX_LINE_BYTES = 2**24
MAX_ID = 2**63


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    timestamp_ms: int
    input_length: int
    hash_ids: tuple[int, ...]
    namespace: str = ""


@dataclass
class TraceFacts:
    """What a trace is, counted while it is probed."""

    requests: int = 0
    tokens: int = 0
    block_names: int = 0
    distinct_block_names: int = 0
    last_ms: int = 0

    def as_dict(self) -> dict[str, int]:
        """Plain data."""
        return dict(vars(self))


def read_prefix_trace(path: Path) -> Iterator[TraceRow]:
    """Its rows, one by one; a name in `.gz` is unpacked on the way. Raises InvalidRequestError, naming the line."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield _row(line, f"{path}, line {number}")
    except (EOFError, zlib.error) as error:
        raise InvalidRequestError(f"{path} cannot be unpacked: {error}.", param="file") from error
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror or error}.", param="file") from error


def _row(line: bytes, where: str) -> TraceRow:
    try:
        record = json.loads(line) if len(line) <= MAX_LINE_BYTES else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise InvalidRequestError(f"{where}: this is no JSON object of at most {MAX_LINE_BYTES:,} bytes.", param="file")
    if "hash_ids" not in record:
        raise InvalidRequestError(
            f"{where}: there are no hash_ids.",
            param="file",
            hint="A recording of events names no blocks; a PrefixTraceWriter beside the engine writes them.",
        )
    length, ids, namespace = record.get("input_length"), record["hash_ids"], record.get("namespace", "")
    is_sound = _is_count(length, 1) and isinstance(ids, list) and ids and all(_is_count(i, -MAX_ID) for i in ids)
    if not is_sound or not _is_count(record.get("timestamp", 0), 0) or not isinstance(namespace, str):
        raise InvalidRequestError(
            f"{where}: timestamp, input_length and hash_ids are whole numbers, namespace is text.", param="file"
        )
    return TraceRow(record.get("timestamp", 0), record["input_length"], tuple(ids), namespace)


def _is_count(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < MAX_ID


def block_tokens_of(rows: Iterable[TraceRow]) -> int:
    """How many tokens one of the trace's blocks holds: the power of two with which every row's lengths agree.

    Raises InvalidRequestError where none does, or several do.
    """
    low, high = 1, MAX_ID
    for row in rows:
        low = max(low, -(-row.input_length // len(row.hash_ids)))
        if len(row.hash_ids) > 1:
            high = min(high, (row.input_length - 1) // (len(row.hash_ids) - 1))
    fitting = [2**k for k in range(63) if low <= 2**k <= high]
    if len(fitting) != 1:
        raise InvalidRequestError(
            "The trace's block size cannot be told from its lengths." if fitting else "The trace's lengths disagree.",
            param="hash_block",
            hint="Say how many tokens a hash id stands for: --hash-block 512.",
        )
    return fitting[0]


def check_block_tokens(row: TraceRow, block_tokens: int) -> None:
    """Raises InvalidRequestError where a row's number of blocks is not that of its length."""
    if len(row.hash_ids) != -(-row.input_length // block_tokens):
        raise InvalidRequestError(
            f"{len(row.hash_ids)} hash_ids cannot be {row.input_length} tokens in blocks of {block_tokens}.",
            param="hash_block",
        )


def probe_trace(rows: Iterable[TraceRow], probe: PrefixProbe, block_tokens: int) -> TraceFacts:
    """Show every row to `probe`, whose unit is the trace's block; returns what the trace is."""
    facts, names = TraceFacts(), set[int]()
    for row in rows:
        check_block_tokens(row, block_tokens)
        probe.entered(row.hash_ids, row.namespace, num_tokens=row.input_length)
        facts.requests += 1
        facts.tokens += row.input_length
        facts.block_names += len(row.hash_ids)
        facts.last_ms = max(facts.last_ms, row.timestamp_ms)
        names.update(row.hash_ids)
    facts.distinct_block_names = len(names)
    return facts


class PrefixTraceWriter:
    """An observer that writes each request's prompt as a trace row: lengths and numbers, no tokens.

    Numbers are given in the order in which blocks are first seen. Prompts only: completions are not told.
    """

    def __init__(self, out: TextIO, clock: Clock, block_size: int = 16) -> None:
        self._out, self._clock, self._block_size = out, clock, block_size
        self._start_ns = clock.now_ns()
        self._numbers: dict[Digest, int] = {}

    def entered(self, token_ids: Sequence[int], namespace: str, root: Digest) -> None:
        """Write one row."""
        row: dict[str, Any] = {
            "timestamp": (self._clock.now_ns() - self._start_ns) // 10**6,
            "input_length": len(token_ids),
            "hash_ids": list(self._name(token_ids, root)),
        }
        self._out.write(json.dumps(row | ({"namespace": namespace} if namespace else {})) + "\n")

    def finished(self, token_ids: Sequence[int], namespace: str, root: Digest) -> None:
        """Nothing is written."""

    def _name(self, token_ids: Sequence[int], parent: Digest) -> Iterator[int]:
        for start in range(0, len(token_ids), self._block_size):
            parent = block_digest(parent, token_ids[start : start + self._block_size])
            yield self._numbers.setdefault(parent, len(self._numbers))
