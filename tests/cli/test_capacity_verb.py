"""`nanovllm capacity`: the figures it prints, their labels, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
# tiny:random in float32: 2 x 2 layers x 2 heads x 16 x 4 B = 512 B a token, 8,192 B a block of 16
TINY = ("capacity", "tiny:random", "--dtype", "float32", "--memory", "1MiB", "--prompt", "100", "--output", "50")


def test_figures_by_hand(nanovllm: Run) -> None:
    """1 MiB is 128 blocks; 100 tokens take 7 blocks, 149 take 10; reserving 2,048 tokens takes all of it."""
    report = json.loads(nanovllm(*TINY, "--json").stdout)
    assert (report["kv_bytes_per_token"], report["pool"]["num_blocks"], report["label"]) == (512, 128, "estimated")
    assert report["concurrency"] == {
        "token_exact_after_prefill": 20, "token_exact_at_end": 13, "paged_after_prefill": 18, "paged_at_end": 12,
        "reserve_max": 1, "reserve_max_tokens": 2048,
    }  # fmt: skip
    assert report["request"]["at_end"]["bound_bytes"] == 11 * 512
    assert "sharing" not in report


def test_sharing_is_potential_and_says_so(nanovllm: Run) -> None:
    """5 full blocks of 80 shared tokens: (128 - 5) / (10 - 5)."""
    report = json.loads(nanovllm(*TINY, "--shared-prefix", "80", "--json").stdout)
    assert report["sharing"]["potential_concurrency_at_end"] == 24
    assert "not a realised gain" in report["sharing"]["note"]
    assert "not a realised gain" in nanovllm(*TINY, "--shared-prefix", "80").stdout


def test_the_text_has_formula_bound_and_labels(nanovllm: Run) -> None:
    lines = nanovllm(*TINY).stdout.splitlines()
    assert "2 x 2 layers x 2 KV heads x 16 head_dim x 4 B = 512 B" in lines[0]
    assert "approximation bound 5,632 B = 11 empty slots (estimated)" in next(
        x for x in lines if x.startswith("at the end")
    )
    assert len([line for line in lines if line.split() and line.split()[0] in {"1", "2", "4", "8", "16", "256"}]) == 6
    assert all("estimated" in line or "measured" in line for line in lines[:5])


def test_weights_inside_the_memory_leave_less_for_kv(nanovllm: Run) -> None:
    outside, inside = (json.loads(nanovllm(*TINY, "--json", *more).stdout) for more in ((), ("--with-weights",)))
    assert inside["pool"]["memory_bytes"] == 2**20 - outside["weights"]["bytes"] > 0
    assert inside["weights"]["inside_memory"] and inside["weights"]["fits_here"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--memory", "1KiB"), "memory"),
        (("--memory", "much"), "memory"),
        (("--with-weights", "--memory", "100KiB"), "memory"),
        (("--prompt", "10", "--shared-prefix", "11"), "shared_prefix"),
        (("--plot", "a.png"), "--compare contiguous"),
        (("--compare", "contiguous", "--plot", "a.gif"), ".png or .svg"),
        (("--compare", "contiguous", "--workload", "mixed_ctxt"), "mixed_ctx"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(nanovllm: Run, arguments: tuple[str, ...], word: str) -> None:
    done = nanovllm("capacity", "tiny:random", "--dtype", "float32", *arguments)
    assert done.returncode == 2 and word in done.stderr and done.stdout == ""


def test_the_comparison_is_simulated_and_drawn(nanovllm: Run, tmp_path: Path) -> None:
    flags = ("--compare", "contiguous", "--requests", "40", "--plot", str(tmp_path / "a.svg"))
    text = nanovllm(*TINY, *flags).stdout
    assert "mixed_ctx, 40 requests, 2,048 token slots (simulated)" in text
    rows = json.loads(nanovllm(*TINY, *flags, "--json").stdout)["compare"]["allocators"]
    names = ["reserve-max", "reserve-exact", "reserve-guess", "paged", "paged, no headroom"]
    assert [row["allocator"] for row in rows] == names and "is an oracle" in text and "kept as headroom" in text
    assert {row["served"] + row["refused"] for row in rows} == {40} and {row["label"] for row in rows} == {"simulated"}
    assert rows[0]["max_concurrency"] == 1 and all(f"{row['ticks']:,}" in text for row in rows)
    assert "reserve-exact" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("columns", [40, 60, 80, 140])
def test_no_figure_is_cut_however_narrow(nanovllm: Run, columns: int) -> None:
    """Every figure of both tables stands whole under a whole header, in lines no longer than the terminal."""
    flags = (*TINY, "--compare", "contiguous", "--requests", "40", "--shared-prefix", "80")
    text = nanovllm(*flags, COLUMNS=str(columns)).stdout
    report = json.loads(nanovllm(*flags, "--json").stdout)
    first = text.split("by block size (estimated)\n")[1].split("\n\nThe engine")[0]
    second = text.split("(simulated)\n")[1].split("\nShares of slots")[0]
    assert "\u2026" not in text and all(len(line) <= columns for line in f"{first}\n{second}".splitlines())
    for row in report["block_sizes"]:
        wanted = [f"{row[key]:,}" for key in ("num_blocks", "blocks_per_request", "after_prefill", "at_end_shared")]
        assert not {*wanted, f"{row['used_share']:.2%}"} - set(first.split()), row
    for row in report["compare"]["allocators"]:
        assert not set(row["allocator"].replace("-", "- ").split()) - set(second.replace("-", "- ").split())
        shares = row["shares_while_somebody_waits"] or row["shares"]
        assert not {f"{row['ticks']:,}", f"{shares['used']:.1%}", f"{shares['headroom']:.1%}"} - set(second.split())
