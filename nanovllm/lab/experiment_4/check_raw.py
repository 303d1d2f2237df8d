"""The raw logs of a bundle: are they there, whole, and of the experiment that the manifest names?

What it is: rules raw, repeats, order, pool, and manifest against headers. What it knows
nothing about: tables. Invariants: nothing of the manifest is believed that a recording can
tell; a log that cannot be read is one finding and ends nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.lab.experiment_4.cases import ARMS, FULL, MIN_REPEATS, RUNS, SHARED_LEN, PlannedRun, Size, plan
from nanovllm.lab.experiment_4.figures import TOKEN_STAGES
from nanovllm.lab.experiment_4.tables import RecordedRun, header_facts, read_run
from nanovllm.lab.findings import Finding, differences
from nanovllm.observe.paths import RequestPath

MANIFEST = "manifest.json"
STAGES = ("entered", "queued", "scheduled", "prefill_begin", "prefill_end", "first_handover", "output_complete")
MAX_TOKENS = 10**6  # of one run's prompts
VOCAB = 256  # lengths do not depend on it


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


def size_of(manifest: dict[str, Any]) -> Size:
    """The size the run says it had, or the full one where it says nothing that makes sense."""
    told = manifest.get("size")
    if not isinstance(told, dict) or told.keys() != vars(FULL).keys():
        return FULL
    if not all(type(value) is int and 1 <= value <= MAX_TOKENS for value in told.values()):
        return FULL
    lengths = (told["short_len"], told["long_len"])
    is_sound = min(lengths) > SHARED_LEN and max(lengths) * told["requests"] <= MAX_TOKENS
    return Size(**told) if is_sound else FULL


def check_plan(manifest: dict[str, Any], runs: list[PlannedRun]) -> Iterator[Finding]:
    """Three repeats of each case and arm, each second one backwards."""
    repeats = min(Counter((run.arm, run.case) for run in runs).get(one, 0) for one in RUNS)
    if repeats < MIN_REPEATS:
        yield Finding("repeats", MANIFEST, str(repeats), str(MIN_REPEATS))
    if runs != (wanted := plan(repeats)):
        first = next((i for i, (a, b) in enumerate(zip(runs, wanted)) if a != b), min(len(runs), len(wanted)))
        names = [of[first].name if first < len(of) else "-" for of in (runs, wanted)]
        yield Finding("order", MANIFEST, *names)
    size = size_of(manifest)
    told = {"size": manifest.get("size"), "pools": manifest.get("pools")}
    for path, found, value in differences(told, {"size": vars(size), "pools": {arm: size.pool(arm) for arm in ARMS}}):
        yield Finding("manifest", f"{MANIFEST} {path}", str(found), str(value))


def read_all(folder: Path, runs: list[PlannedRun]) -> tuple[list[RecordedRun], list[Finding]]:
    """Every run that can be read, and why the others cannot."""
    recorded, findings = [], []
    for planned in runs:
        try:
            recorded.append(read_run(folder, planned))
        except InvalidRequestError as error:
            findings.append(Finding("raw", planned.name, str(error).replace(f"{folder}/", "")))
    return recorded, findings


def check_run(run: RecordedRun, size: Size, seed: int) -> Iterator[Finding]:
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
    for path in run.replay.paths.values():
        yield from _check_request(name, path, lengths.get(path.request_id, path.generated_len))


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


def check_headers(manifest: dict[str, Any], recorded: list[RecordedRun]) -> Iterator[Finding]:
    """The manifest's facts are every recording's, and runs that were measured came in its order."""
    for run in recorded:
        for path, found, value in differences(manifest.get("run"), header_facts(run), "run"):
            yield Finding("manifest", f"{MANIFEST} {path} ({run.planned.name})", str(found), str(value))
    for name in ("seed", "command"):
        if recorded and manifest.get(name) != (value := getattr(recorded[0].replay.recording.header, name)):
            yield Finding("manifest", f"{MANIFEST} {name}", str(manifest.get(name)), str(value))
    for before, after in pairwise(recorded):
        a, b = before.replay.recording, after.replay.recording
        if a.label == b.label == "measured" and b.start_ns < a.end_ns:
            yield Finding("order", MANIFEST, f"{after.planned.name} before {before.planned.name}", "as they were run")
