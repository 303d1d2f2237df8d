"""Prefix traces: read strictly, and probed like the tokens they stand for."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from nanovllm.core.clock import VirtualClock
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.prefix_trace import (
    PrefixTraceWriter,
    TraceRow,
    block_tokens_of,
    probe_trace,
    read_prefix_trace,
)
from nanovllm.observe.probe import PrefixProbe, total


def rows_of(*lengths_and_ids: tuple[int, list[int]]) -> list[dict[str, Any]]:
    return [{"timestamp": 10 * i, "input_length": n, "hash_ids": ids} for i, (n, ids) in enumerate(lengths_and_ids)]


# Blocks of 512. Row 2 shares two blocks with row 1; row 3 is row 1 again, whose last token lies in its third block.
ROWS = rows_of((1400, [1, 2, 3]), (1100, [1, 2, 9]), (1400, [1, 2, 3]), (512, [1]))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return written(tmp_path / "trace.jsonl", ROWS)


def test_by_hand(trace: Path) -> None:
    """2 + 2 + 0 blocks: a prompt of exactly one block computes its last token, so its block cannot count."""
    probe = PrefixProbe([512, 1024], [None, 2], unit_tokens=512)
    facts = probe_trace(read_prefix_trace(trace), probe, 512)
    assert facts.as_dict() == {
        "requests": 4, "tokens": 4412, "block_names": 10, "distinct_block_names": 4, "last_ms": 30,
    }  # fmt: skip
    figures = probe.figures()
    assert [total(figures, size).overlap_tokens for size in (512, 1024)] == [4 * 512, 2 * 1024]
    assert total(figures, 512, 2).overlap_tokens == 4 * 512  # blocks 1 and 2 are the most recent ones all along


def test_the_block_size_is_told_by_the_lengths(trace: Path) -> None:
    assert block_tokens_of(read_prefix_trace(trace)) == 512
    rows = [TraceRow(0, 31, (1, 2)), TraceRow(0, 16, (1,))]
    assert block_tokens_of(rows) == 16
    with pytest.raises(InvalidRequestError, match="cannot be told"):
        block_tokens_of([TraceRow(0, 3, (1,))])
    with pytest.raises(InvalidRequestError, match="disagree"):
        block_tokens_of([*rows, TraceRow(0, 17, (1,))])


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "{broken",
        "[" * 3000,
        '{"input_length": 3}',
        '{"input_length": 0, "hash_ids": [1]}',
        '{"input_length": true, "hash_ids": [1]}',
        '{"input_length": 3, "hash_ids": []}',
        '{"input_length": 3, "hash_ids": ["a"]}',
        '{"input_length": 3, "hash_ids": [9223372036854775808]}',
        '{"input_length": 3, "hash_ids": [1], "timestamp": -1}',
        '{"input_length": 3, "hash_ids": [1], "namespace": 5}',
        "\xff\xfe",
    ],
)
def test_what_is_no_row_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes((json.dumps(ROWS[0]) + "\n" + line + "\n").encode("latin-1"))
    with pytest.raises(InvalidRequestError, match="line 2"):
        list(read_prefix_trace(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        list(read_prefix_trace(tmp_path / "none"))


def test_what_was_written_is_probed_like_the_tokens_themselves(tmp_path: Path) -> None:
    """Through the file or beside the engine, the same requests give the same figures."""
    draw, clock, out = random.Random(2), VirtualClock(), io.StringIO()
    writer, direct = PrefixTraceWriter(out, clock, block_size=4), PrefixProbe([4, 8])
    stems = [[draw.randrange(9) for _ in range(20)] for _ in range(3)]
    for _ in range(40):
        prompt = draw.choice(stems)[: draw.randrange(1, 20)] + [draw.randrange(9) for _ in range(draw.randrange(1, 5))]
        namespace = draw.choice(["a", "b"])
        writer.entered(prompt, namespace, namespace.encode())
        direct.entered(prompt, namespace, namespace.encode())
        clock.advance(1_000_000)
    path = tmp_path / "own.jsonl"
    path.write_text(out.getvalue())
    rows, replayed = list(read_prefix_trace(path)), PrefixProbe([4, 8], unit_tokens=4)
    assert block_tokens_of(rows) == 4 and rows[-1].timestamp_ms == 39
    probe_trace(rows, replayed, 4)
    assert replayed.figures() == direct.figures()
    assert total(direct.figures(), 4).overlap_tokens > 0


def test_a_compressed_trace_is_read_and_a_torn_one_refused(trace: Path) -> None:
    packed = trace.with_name("trace.jsonl.gz")
    packed.write_bytes(gzip.compress(trace.read_bytes()))
    assert list(read_prefix_trace(packed)) == list(read_prefix_trace(trace))
    whole = packed.read_bytes()
    for broken in (whole[:-9], whole[:12] + bytes([whole[12] ^ 0xFF]) + whole[13:], b"no gzip at all"):
        packed.write_bytes(broken)
        with pytest.raises(InvalidRequestError, match=r"cannot be|no JSON object"):
            list(read_prefix_trace(packed))
