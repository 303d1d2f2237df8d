"""Runs on the virtual clock, recorded as the command line records them: simulated, so every figure is exact."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanovllm.engine.run_header import knobs_of
from nanovllm.observe.recording import Recording, read_recording
from nanovllm.observe.recording_writer import JsonlWriter
from nanovllm.observe.records import RunHeader
from tests.engine.helpers import Bench

HEADER = RunHeader(
    label="simulated",
    model="shadow",
    weights="shadow",
    dtype="float32",
    policy="fcfs",
    schedule_mode="mixed",
    block_size=4,
    num_blocks=64,
    block_bytes=1024,
    prefix_mode="reuse",
    prior_state="cold",
    seed=0,
    version="0",
    command="",
    knobs={},
)


def header_of(bench: Bench, **more: Any) -> RunHeader:
    policy, manager = bench.scheduler.policy, bench.manager
    told = {
        "block_size": manager.block_size,
        "num_blocks": manager.num_blocks,
        "schedule_mode": policy.mode,
        "prefix_mode": manager.prefix_mode,
        "prior_state": "warm" if manager.free_block_ids.num_cached else "cold",
        "knobs": knobs_of(policy, bench.scheduler.watermark_blocks),
    }
    return RunHeader(**{**HEADER.__dict__, **told, **more})


def record(bench: Bench, requests: Iterable[tuple[int, dict[str, Any]]], file: Path, **header: Any) -> dict[str, Any]:
    """Add each request at its nanosecond, or as soon after it as a step ends, and drain; the finished requests."""
    to_come = sorted(requests, key=lambda pair: pair[0])
    finals: dict[str, Any] = {}
    with JsonlWriter(bench.engine.events, file, header_of(bench, **header), blocks=True) as writer:
        while to_come or not bench.engine.is_finished():
            if bench.engine.is_finished() and to_come[0][0] > bench.clock.now_ns():
                bench.clock.advance(to_come[0][0] - bench.clock.now_ns())
            while to_come and to_come[0][0] <= bench.clock.now_ns():
                at_ns, request = to_come.pop(0)
                bench.engine.add_request(**request, arrival_ns=at_ns)
            finals |= {out.request_id: out.final for out in bench.step() if out.final}
            writer.pump()
    return finals


def recorded(bench: Bench, requests: Iterable[tuple[int, dict[str, Any]]], folder: Path, **header: Any) -> Recording:
    record(bench, requests, folder / "run.jsonl", **header)
    return read_recording(folder / "run.jsonl")
