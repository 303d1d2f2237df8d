"""Contiguous reservations beside pages: small cases worked by hand, and laws for all others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.errors import ConfigError
from nanovllm.lab.allocation_plot import check_plot_path, plot
from nanovllm.lab.allocation_replay import (
    Demand,
    Replay,
    Sample,
    compare_contiguous,
    demands_of,
    replay,
)
from nanovllm.lab.allocators import RESERVATIONS, Allocator, Contiguous, Paged
from nanovllm.lab.first_fit import FirstFit
from nanovllm.lab.workloads import generate


def contiguous(name: str, capacity: int, max_len: int = 8, guess: int = 2) -> Contiguous:
    return Contiguous(name, capacity, max_len=max_len, guess=guess)


def by_kind(sample: Sample) -> tuple[int, ...]:
    return (sample.used, sample.reserved, sample.internal, sample.external, sample.headroom, sample.free)


# -- the address space -----------------------------------------------------------------------------


def test_first_fit_by_hand() -> None:
    space = FirstFit(10)
    assert [space.allocate(length) for length in (3, 2, 4)] == [0, 3, 5]
    assert space.holes == [(9, 1)] and space.allocate(2) is None
    space.free(0)
    space.free(5)
    assert space.holes == [(0, 3), (5, 5)]
    assert space.num_free == 8 and space.longest_hole == 5 and space.allocate(6) is None
    assert space.allocate(4) == 5  # the first hole is too short for it
    space.free(3)
    assert space.holes == [(0, 5), (9, 1)]
    assert space.extend(5, 1) and not space.extend(5, 1) and space.pieces == {5: 5}


@given(st.lists(st.tuples(st.sampled_from("afe"), st.integers(1, 9)), max_size=60), st.integers(1, 40))
def test_pieces_never_overlap_and_nothing_is_lost(calls: list[tuple[str, int]], capacity: int) -> None:
    space = FirstFit(capacity)
    for call, number in calls:
        starts = sorted(space.pieces)
        longest = space.longest_hole
        if call == "a":
            assert (space.allocate(number) is None) == (number > longest)
        elif starts and call == "f":
            space.free(starts[number % len(starts)])
        elif starts:
            space.extend(starts[number % len(starts)], number)
        spans = sorted([*((s, n, "piece") for s, n in space.pieces.items()), *((s, n, "hole") for s, n in space.holes)])
        at, before = 0, ""
        for start, length, kind in spans:
            assert start == at and length > 0 and not kind == before == "hole"
            at, before = start + length, kind
        assert at == capacity


# -- by hand ---------------------------------------------------------------------------------------


def test_every_kind_of_slot_by_hand() -> None:
    """24 slots, one request of 3 prompt and 3 output tokens: it holds 3, 4, 5 tokens, and reserve-max gives it 8."""
    demand = [Demand("a", 3, 3)]
    expected = {
        "reserve-max": [(3, 2, 3, 0, 0, 16), (4, 1, 3, 0, 0, 16), (5, 0, 3, 0, 0, 16)],
        "reserve-exact": [(3, 2, 0, 0, 0, 19), (4, 1, 0, 0, 0, 19), (5, 0, 0, 0, 0, 19)],
        "reserve-guess": [(3, 2, 0, 0, 0, 19), (4, 1, 0, 0, 0, 19), (5, 0, 0, 0, 0, 19)],
        "paged": [(3, 1, 0, 0, 0, 20), (4, 0, 0, 0, 0, 20), (5, 0, 3, 0, 0, 16)],
    }
    for allocator in (*(contiguous(name, 24) for name in RESERVATIONS), Paged(6, 4)):
        assert [by_kind(sample) for sample in replay(allocator, demand).samples] == expected[allocator.name]


def test_external_fragmentation_by_hand() -> None:
    """10 slots: a [0,3) b [3,7) c [7,10). When a and c are gone, d needs 5 of the 6 free ones and waits for b."""
    demands = [Demand("a", 2, 2), Demand("b", 1, 4), Demand("c", 2, 2), Demand("d", 4, 2)]
    fragmented = replay(contiguous("reserve-exact", 10), demands)
    assert [sample.external for sample in fragmented.samples] == [0, 0, 6, 6, 0, 0]
    assert fragmented.failed_admissions == 4 and fragmented.requests_that_failed == {"d"}
    assert [sample.live for sample in fragmented.samples] == [3, 3, 1, 1, 1, 1]
    paged = replay(Paged(10, 1), demands)
    assert max(sample.external for sample in paged.samples) == 0
    assert len(paged.samples) == 4 and len(fragmented.samples) == 6


def test_a_reservation_too_large_wastes_and_one_too_small_fails() -> None:
    """R49: reserve-max fits 1 of 3 at a time; a fixed reservation refuses what is longer; a guess is outgrown."""
    demands = [Demand(key, 2, 3) for key in "abc"]
    assert [sample.live for sample in replay(contiguous("reserve-max", 12), demands).samples] == [1] * 9
    assert [sample.live for sample in replay(contiguous("reserve-exact", 12), demands).samples] == [3] * 3
    assert replay(contiguous("reserve-max", 12, max_len=3), demands).refused == ["a", "b", "c"]
    guessing = contiguous("reserve-guess", 30, guess=1)
    done = replay(guessing, [Demand(key, 2, 8) for key in "ab"])
    assert len(done.served) == 2 and guessing.num_outgrown > 0 and guessing.num_moved_tokens > 0


def test_who_cannot_grow_preempts_the_last_one() -> None:
    """Two blocks of 2 and one kept free: b waits for a; with three, b enters and gives way when a grows."""
    demands = [Demand("a", 2, 3), Demand("b", 2, 2)]
    tight, roomy = replay(Paged(2, 2), demands), replay(Paged(4, 2), demands)
    assert [sample.live for sample in tight.samples] == [1, 1, 1, 1, 1]
    assert roomy.preemptions == 0 and [sample.live for sample in roomy.samples] == [2, 2, 1]
    middle = replay(Paged(3, 2), demands)
    assert middle.preemptions == 1 and sorted(middle.served) == ["a", "b"]


def test_what_is_free_and_kept_is_headroom_by_hand() -> None:
    """4 blocks of 2. a and b take one each; c needs one of the two free, which are kept for a's and b's growth."""
    demands = [Demand(key, 2, 2) for key in "abc"]
    kept, bare = replay(Paged(4, 2), demands), replay(Paged(4, 2, keeps_headroom=False), demands)
    assert kept.allocator == "paged" and bare.allocator == "paged, no headroom"
    assert [sample.live for sample in kept.samples] == [2, 2, 1, 1]
    assert [by_kind(sample) for sample in kept.samples[:2]] == [(4, 0, 0, 0, 4, 0), (6, 0, 2, 0, 0, 0)][:2]
    assert [sample.live for sample in bare.samples] == [3, 2, 1] and bare.preemptions == 1


def test_where_pages_hold_fewer_than_the_oracle_it_is_headroom() -> None:
    """64 MiB of SmolLM2: nearly all that stands free is kept; without headroom pages hold more than the oracle."""
    workload = generate("mixed_ctx", seed=0, sessions=200, length=12, long_len=100, output_len=20)
    document, _ = compare_contiguous(workload, 182, 16, max_len=8192, guess=20)
    rows = {row["allocator"]: row for row in document["allocators"]}
    oracle, paged, bare = (rows[name] for name in ("reserve-exact", "paged", "paged, no headroom"))
    assert paged["mean_concurrency"] < oracle["mean_concurrency"] < bare["mean_concurrency"]
    busy = paged["shares_while_somebody_waits"]
    assert busy["headroom"] > 0.2 and busy["free"] < 0.01 and paged["preemptions"] == 0 < bare["preemptions"]
    assert bare["shares_while_somebody_waits"]["headroom"] == oracle["shares"]["headroom"] == 0


# -- laws ------------------------------------------------------------------------------------------

LENGTHS = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(0, 15))
DEMANDS = st.lists(LENGTHS, min_size=1, max_size=14).map(
    lambda found: [Demand(f"r{i}", prompt, output, tick) for i, (prompt, output, tick) in enumerate(found)]
)


def all_of(capacity_blocks: int, block_size: int, max_len: int) -> list[Allocator]:
    capacity = capacity_blocks * block_size
    return [
        *(contiguous(name, capacity, max_len, guess=3) for name in RESERVATIONS),
        Paged(capacity_blocks, block_size),
        Paged(capacity_blocks, block_size, keeps_headroom=False),
    ]


@given(demands=DEMANDS, num_blocks=st.integers(2, 20), block_size=st.integers(1, 4), max_len=st.integers(5, 22))
@settings(max_examples=60, deadline=None)
def test_slots_are_conserved_and_every_request_ends_once(
    demands: list[Demand], num_blocks: int, block_size: int, max_len: int
) -> None:
    for allocator in all_of(num_blocks, block_size, max_len):
        done = replay(allocator, demands)
        for sample in done.samples:
            assert min(by_kind(sample)) >= 0 and sum(by_kind(sample)) == allocator.capacity
        assert sorted([*done.served, *done.refused]) == sorted(demand.key for demand in demands)
        assert [d.key for d in demands if not allocator.can_ever(d.prompt, d.final)] == sorted(
            done.refused, key=lambda key: int(key[1:])
        )
        assert sum(s.used for s in done.samples) >= sum(d.prompt for d in demands if d.key in done.served)


@given(demands=DEMANDS, num_blocks=st.integers(2, 20), block_size=st.integers(1, 4), max_len=st.integers(21, 30))
@settings(max_examples=60, deadline=None)
def test_what_each_way_of_reserving_cannot_do(
    demands: list[Demand], num_blocks: int, block_size: int, max_len: int
) -> None:
    longest, exact, _, paged, bare = (replay(a, demands) for a in all_of(num_blocks, block_size, max_len))
    assert all(sample.internal == 0 for sample in exact.samples)  # an oracle wastes nothing for ever
    assert all(
        sample.external == 0 for sample in (*longest.samples, *paged.samples, *bare.samples)
    )  # equal pieces: any one will do
    assert all(sample.internal < block_size * max(sample.live, 1) for sample in paged.samples)
    assert all(sample.reserved < block_size * max(sample.live, 1) for sample in paged.samples)
    assert all(sample.headroom == 0 for done in (longest, exact, bare) for sample in done.samples)
    assert bare.samples[0].live >= paged.samples[0].live  # into an empty pool
    assert not set(exact.refused) - set(longest.refused)
    assert longest.samples[0].live <= exact.samples[0].live  # into an empty space, less fits of what is larger
    given_max, given_exact = (
        r.samples[0].used + r.samples[0].reserved + r.samples[0].internal for r in (longest, exact)
    )
    assert given_max * exact.samples[0].live >= given_exact * longest.samples[0].live  # slots a request


def test_a_workloads_plan_in_ticks() -> None:
    workload = generate("multi_turn", sessions=2, turns=2, rate=5.0, think_ms=50)
    first, second, *_ = demands_of(workload, tick_ns=20 * 10**6)
    assert (first.tick, second.after, second.delay) == (0, "s0-t0", 3)
    assert second.prompt == first.prompt + first.output + workload.requests[1].new_tokens
    done = replay(Paged(64, 16), demands_of(workload))
    assert done.served.index("s0-t0") < done.served.index("s0-t1")
    assert len(done.samples) > first.output + second.output + 3


# -- the comparison --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison() -> tuple[dict[str, object], list[Replay]]:
    workload = generate("mixed_ctx", sessions=60, length=32, long_len=256, output_len=64, spread=0.5)
    return compare_contiguous(workload, 128, 16, max_len=1024, guess=64)


def test_pages_turn_waste_into_concurrency(comparison: tuple[dict[str, object], list[Replay]]) -> None:
    """R50, the PagedAttention argument with numbers: same slots, same requests."""
    document, _ = comparison
    rows = {row["allocator"]: row for row in document["allocators"]}
    assert document["label"] == "simulated" and {row["label"] for row in rows.values()} == {"simulated"}
    busy = {name: row["shares_while_somebody_waits"] for name, row in rows.items()}
    assert busy["reserve-max"]["internal"] > 0.7 and busy["paged"]["used"] > 0.8
    assert busy["reserve-exact"]["external"] > 0.05 and rows["reserve-exact"]["max_internal"] == 0
    assert rows["paged"]["mean_concurrency"] > rows["reserve-exact"]["mean_concurrency"]
    assert rows["reserve-exact"]["mean_concurrency"] > 3 * rows["reserve-max"]["mean_concurrency"]
    assert rows["reserve-max"]["failed_admissions"] > rows["paged"]["failed_admissions"] > 0


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_plot_is_written(
    comparison: tuple[dict[str, object], list[Replay]], tmp_path: Path, suffix: str, magic: bytes
) -> None:
    document, replays = comparison
    path = tmp_path / f"plot{suffix}"
    plot(replays, document, path)
    assert path.read_bytes().startswith(magic)
    if suffix == ".svg":
        drawn = path.read_text()
        assert all(
            f">{word}<" in drawn
            for word in (
                "reserve-guess",
                "reserve-exact (oracle)",
                "paged",
                "kept as headroom",
                "external fragmentation",
                "free",
            )
        )
        failed = [row["failed_admissions"] for row in document["allocators"]]
        assert all(f">{count:,} failed admissions<" in drawn for count in failed) and "(simulated)" in drawn
        plot(replays, document, path)
        assert path.read_text() == drawn


def test_a_plot_that_cannot_be_is_refused(
    comparison: tuple[dict[str, object], list[Replay]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, replays = comparison
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        check_plot_path(tmp_path / "plot.gif")
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(replays, document, tmp_path / "nowhere" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"needs the package matplotlib.* pip install"):
        check_plot_path(tmp_path / "plot.png")
