"""Held state: how many requests hold state over a recorded run, in how many blocks, and how large each one's is.

What it is: levels over time and sizes, read off a replay. What it knows nothing about: latencies,
causes. Invariants: blocks of the pool are those the engine told at each launch; what one request
holds is not told, so it follows from its tokens, is labelled `estimated` and carries its bound.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

from nanovllm.observe.paths import Replay, RequestPath, holding_changes
from nanovllm.observe.records import RunHeader
from nanovllm.observe.statistics import HeldState, Level, integral, levels, state_size, time_mean


def used_blocks(run: Replay) -> list[Level]:
    """Blocks that somebody holds, as told at each launch and at the end of each step's last release."""
    num_blocks = run.recording.header.num_blocks
    series = [Level(step.start_ns, num_blocks - step.event.free_blocks) for step in run.steps]
    is_drained = all(path.end for path in run.paths.values())
    return [*series, Level(run.recording.end_ns, 0)] if is_drained and series else series


def table_entries(run: Replay) -> list[Level]:
    """Block table entries of all live requests, from their tokens: a shared block counts once for each that shares."""
    size = run.recording.header.block_size
    return levels(change for path in run.paths.values() for change in _entry_changes(path, size))


def _entry_changes(path: RequestPath, size: int) -> Iterator[tuple[int, int]]:
    """A table has room for all known tokens when its step is launched."""
    times = path.timeline.token_ns
    for hold in path.holds:
        known = path.prompt_len + bisect_right(times, hold.start_ns)
        held = -(-known // size)
        yield hold.start_ns, held
        for at_ns in times[known - path.prompt_len : bisect_left(times, hold.end_ns)]:
            known += 1
            if known > held * size:
                held += 1
                yield at_ns, 1
        yield hold.end_ns, -held


def last_state(path: RequestPath, header: RunHeader) -> dict[str, Any]:
    """What a request held at last: its tokens with KV in whole blocks, exactly, and the bound between the two."""
    generated = bisect_right(path.timeline.token_ns, path.holds[-1].end_ns) if path.holds else 0
    tokens = path.prompt_len + max(0, generated - 1) if path.holds else 0  # nobody reads the KV of the last token
    held = HeldState(path.name, -(-tokens // header.block_size), tokens, False)
    size = state_size(held, header.block_size, header.block_bytes)
    return {
        "label": "estimated",
        "blocks": held.blocks,
        "tokens": tokens,
        "block_exact_bytes": size.block_exact,
        "token_exact_bytes": size.token_exact,
        "approximation_bound_bytes": size.approximation_bound,
    }


def state_summary(run: Replay) -> dict[str, Any]:
    """Live requests, those still prefilling, waiting ones, blocks by state, bytes by kind, sharing."""
    header, paths = run.recording.header, list(run.paths.values())
    live, prefilling = (levels(holding_changes(paths, prefilling=only)) for only in (False, True))
    waiting = levels([c for p in paths for s in p.waits for c in ((s.start_ns, 1), (s.end_ns, -1))])
    used, cached = used_blocks(run), [Level(step.start_ns, step.event.cached_blocks) for step in run.steps]
    free = [Level(step.start_ns, step.event.free_blocks - step.event.cached_blocks) for step in run.steps]
    blocks = {"used": used, "cached": cached, "free": free}
    by_state = {name: over_time(run, series) for name, series in blocks.items()}
    return {
        "num_blocks": header.num_blocks,
        "block_bytes": header.block_bytes,
        "live_requests": over_time(run, live),
        "prefilling_requests": over_time(run, prefilling),
        "waiting_requests": over_time(run, waiting),
        **{f"{name}_blocks": found for name, found in by_state.items()},
        "bytes_by_kind_max": {
            kind: int(by_state[name]["max"] or 0) * header.block_bytes
            for kind, name in (("kv_held", "used"), ("kv_cached", "cached"), ("free", "free"))
        },
        "sharing_factor": {"label": "estimated", "mean": _sharing(run, used)},
    }


def over_time(run: Replay, series: list[Level]) -> dict[str, float | None]:
    """A level's mean over the run, and its maximum."""
    mean = time_mean(series, run.recording.start_ns, run.recording.end_ns)
    return {"mean": None if mean is None else round(mean, 3), "max": max((level.amount for level in series), default=0)}


def _sharing(run: Replay, used: list[Level]) -> float | None:
    """Block table entries per used block, both taken over the whole run."""
    between = (run.recording.start_ns, run.recording.end_ns)
    held = integral(used, *between)
    return round(integral(table_entries(run), *between) / held, 3) if held else None
