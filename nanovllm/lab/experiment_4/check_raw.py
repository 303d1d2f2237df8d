"""The raw logs of a bundle: are they there, whole, and of the experiment that the manifest names?

What it is: rules raw, repeats, order and pool. What it knows
nothing about: tables. Invariants: nothing of the manifest is believed that a recording can
tell; a log that cannot be read is one finding and ends nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanovllm.core.events import RequestEvent
from nanovllm.errors import InvalidRequestError
from nanovllm.lab.bundle import RAW
from nanovllm.lab.experiment_4.cases import MIN_REPEATS, RUNS, PlannedRun, Size, plan
from nanovllm.lab.experiment_4.figures import TOKEN_STAGES
from nanovllm.lab.experiment_4.tables import RecordedRun, read_run
from nanovllm.lab.findings import Finding
from nanovllm.observe.paths import RequestPath
from nanovllm.observe.prefix_trace import read_prefix_trace

MANIFEST = "manifest.json"
STAGES = ("entered", "queued", "scheduled", "prefill_begin", "prefill_end", "first_handover", "output_complete")
VOCAB = 256  # neither lengths nor which blocks are equal depend on it


def planned_runs(manifest: dict[str, Any]) -> list[PlannedRun]:
    """The runs that the manifest names, in its order; empty where it names none that make sense."""
    try:
        runs = [
            PlannedRun(**{key: one[key] for key in ("position", "arm", "case", "repeat")}) for one in manifest["order"]
        ]
    except (KeyError, TypeError):
        return []
    is_sound = all((run.arm, run.case) in RUNS and type(run.position) is type(run.repeat) is int for run in runs)
    return runs if is_sound else []


def check_plan(runs: list[PlannedRun]) -> Iterator[Finding]:
    """Three repeats of each case and arm, each second one backwards."""
    repeats = min(Counter((run.arm, run.case) for run in runs).get(one, 0) for one in RUNS)
    if repeats < MIN_REPEATS:
        yield Finding("repeats", MANIFEST, str(repeats), str(MIN_REPEATS))
    if runs != (wanted := plan(repeats)):
        first = next((i for i, (a, b) in enumerate(zip(runs, wanted)) if a != b), min(len(runs), len(wanted)))
        names = [of[first].name if first < len(of) else "-" for of in (runs, wanted)]
        yield Finding("order", MANIFEST, *names)


def read_all(folder: Path, runs: list[PlannedRun]) -> tuple[list[RecordedRun], list[Finding]]:
    """Every run that can be read, and why the others cannot."""
    recorded, findings = [], []
    for planned in runs:
        try:
            recorded.append(read_run(folder, planned))
        except InvalidRequestError as error:
            findings.append(Finding("raw", planned.name, str(error).replace(f"{folder}/", "")))
    return recorded, findings


def check_run(folder: Path, run: RecordedRun, size: Size, seed: int) -> Iterator[Finding]:
    """One run: nothing lost, every request whole, and the requests of the seed on the arm's pool."""
    name, recording = run.planned.name, run.replay.recording
    yield from (Finding("raw", name, remark) for remark in recording.remarks)
    if recording.header.num_blocks != (pool := size.pool(run.planned.arm)):
        yield Finding("pool", name, str(recording.header.num_blocks), str(pool))
    steps = [step.event.step for step in run.replay.steps]
    if steps != list(range(1, len(steps) + 1)):
        yield Finding("raw", name, "the steps are not numbered through")
    planned = size.workload(run.planned.case, seed, VOCAB)
    lengths = {request.request_id: request.output_len for request in planned.requests}
    prompts = planned.prompt_lens()
    if (found := {path.request_id: path.prompt_len for path in run.replay.paths.values()}) != prompts:
        first = next((i for i in {**found, **prompts} if found.get(i) != prompts.get(i)), "?")
        yield Finding(
            "raw", name, f"request {first} is not the seed's: {found.get(first)}, not {prompts.get(first)} tokens"
        )
    yield from _check_prefixes(folder, run, size, seed)
    for path in run.replay.paths.values():
        yield from _check_request(name, path, lengths.get(path.request_id, path.generated_len))


def _check_prefixes(folder: Path, run: RecordedRun, size: Size, seed: int) -> Iterator[Finding]:
    """The prefix trace names the blocks of the seed's prompts, in the order in which they entered."""
    prompts = {
        request.request_id: [token for part in request.parts for token in part.token_ids]
        for request in size.workload(run.planned.case, seed, VOCAB).requests
    }
    events = [event for event in run.replay.recording.events if isinstance(event, RequestEvent)]
    entered = [event.request_id for event in events if event.stage == "entered"]
    rows = list(read_prefix_trace(folder / RAW / f"{run.planned.name}.prefixes.jsonl"))
    found = [(row.input_length, row.hash_ids, row.namespace) for row in rows]
    wanted = list(_block_names([prompts.get(name, []) for name in entered], run.replay.recording.header.block_size))
    if found != wanted:
        first = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
        yield Finding("raw", f"{run.planned.name}.prefixes", f"row {first + 1} is not of the seed's prompts")
    moments = [row.timestamp_ms for row in rows]
    if moments != sorted(moments):
        yield Finding("raw", f"{run.planned.name}.prefixes", "it goes back in time")


def _block_names(prompts: list[list[int]], block_size: int) -> Iterator[tuple[int, tuple[int, ...], str]]:
    """(length, block numbers, namespace) of each prompt; blocks are numbered as they are first seen."""
    names: dict[tuple[int, tuple[int, ...]], int] = {}
    for tokens in prompts:
        parent, numbers = -1, list[int]()
        for start in range(0, len(tokens), block_size):
            parent = names.setdefault((parent, tuple(tokens[start : start + block_size])), len(names))
            numbers.append(parent)
        yield len(tokens), tuple(numbers), ""


def _check_request(run: str, path: RequestPath, output_len: int) -> Iterator[Finding]:
    """Each record that a completed request leaves."""
    stages = Counter(event.stage for event in path.events)
    missing = [stage for stage in (*STAGES, "state_released") if not stages[stage]]
    tokens = sum(stages[stage] for stage in TOKEN_STAGES)
    computed = sum(run.num_tokens for run in path.timeline.prefill_runs if run.epoch == 0)
    if missing:
        yield Finding("raw", run, f"{path.name} has no record {', '.join(missing)}")
    if tokens != output_len or path.generated_len != output_len:
        yield Finding("raw", run, f"{path.name} has {tokens} records of {output_len} tokens")
    if computed != path.prompt_len and not stages["preempted"]:
        yield Finding("raw", run, f"{path.name} computed {computed} of {path.prompt_len} prompt tokens")
    moments = [event.ts_ns for event in path.events if event.stage not in ("entered", "queued")]
    if moments != sorted(moments):
        yield Finding("raw", run, f"{path.name} goes back in time")


def check_sequence(recorded: list[RecordedRun]) -> Iterator[Finding]:
    """Runs that were measured came in the manifest's order."""
    for before, after in pairwise(recorded):
        a, b = before.replay.recording, after.replay.recording
        if a.label == b.label == "measured" and b.start_ns < a.end_ns:
            yield Finding("order", MANIFEST, f"{after.planned.name} before {before.planned.name}", "as they were run")
