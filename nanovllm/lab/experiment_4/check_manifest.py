"""The manifest's own facts: all there, none invented, each as the plan and the recordings have it.

What it is: rule manifest. What it knows nothing about: tables, digests. Invariants: every
field that a run writes is demanded and no other is taken; a field of the wrong shape is one finding and ends nothing.
What no recording tells (commit, processor, versions) is held to its shape alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from nanovllm.lab.bundle import PROSE
from nanovllm.lab.environment import PACKAGES
from nanovllm.lab.experiment_4.cases import ARMS, ENGINE, LAB_VERSION, RUNS, WARMUP, PlannedRun, size_of
from nanovllm.lab.experiment_4.tables import RecordedRun, header_facts
from nanovllm.lab.findings import MISSING, Finding, differences

MANIFEST = "manifest.json"
COMMIT = re.compile(r"(?=.*[1-9a-f])[0-9a-f]{40}([0-9a-f]{24})?")
TOKEN_BYTES = re.compile(r"2 x .* = ([\d,]+) B")
SLACK = timedelta(seconds=2)  # `started` and `finished` are whole seconds


def _is_count(value: Any, low: int = 1) -> bool:
    return type(value) is int and value >= low


def _is_loads(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(one) in (int, float) and one >= 0 for one in value)


def _is_moment(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).utcoffset() == timedelta(0)
    except (TypeError, ValueError):
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


SHAPES: Mapping[str, Callable[[Any], bool]] = {
    "command": lambda value: isinstance(value, str),
    "commit": lambda value: value is None or (isinstance(value, str) and COMMIT.fullmatch(value) is not None),
    "dirty": lambda value: value is None or isinstance(value, bool),
    "diagrams": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "environment": lambda value: isinstance(value, dict),
    "finished": _is_moment,
    "lang": lambda value: value in ("en", "zh"),
    "quick": lambda value: isinstance(value, bool),
    "run": lambda value: isinstance(value, dict),
    "seed": lambda value: _is_count(value, 0),
    "started": _is_moment,
    "version": _is_text,
    "files": lambda value: isinstance(value, dict),
    "sha256": _is_text,
    "status": _is_text,
}
MACHINE: Mapping[str, Callable[[Any], bool]] = {
    "python": _is_text,
    "platform": _is_text,
    "processor": _is_text_or_none,
    "logical_cpus": lambda value: value is None or _is_count(value),
    "memory_bytes": _is_count,
    "packages": lambda value: (
        isinstance(value, dict) and set(value) == set(PACKAGES) and all(map(_is_text_or_none, value.values()))
    ),
    "load_average_before": _is_loads,
    "load_average_after": _is_loads,
    "kv_shape": lambda value: isinstance(value, str) and TOKEN_BYTES.fullmatch(value) is not None,
    "num_threads": lambda value: _is_count(value, 0),
    "device": _is_text,
}


def check_shape(manifest: Mapping[str, Any], runs: list[PlannedRun]) -> Iterator[Finding]:
    """Fields missing, invented or of no sense, and those that follow from the plan."""
    fixed = _fixed(manifest, runs)
    yield from _shapes(manifest, {**SHAPES, **{name: lambda value: True for name in fixed}}, "")
    machine = manifest.get("environment")
    if isinstance(machine, dict):
        yield from _shapes(machine, MACHINE, "environment.")
    told = {name: manifest[name] for name in fixed if name in manifest}
    for path, found, value in differences(told, {name: fixed[name] for name in told}):
        yield _finding(path, found, value)
    if (manifest.get("commit") is None) != (manifest.get("dirty") is None):
        yield _finding("dirty", manifest.get("dirty"), "told with the commit")


def _fixed(manifest: Mapping[str, Any], runs: list[PlannedRun]) -> dict[str, Any]:
    """Fields whose values follow from the seed, `quick` and the order."""
    engine, size = manifest.get("engine"), size_of(manifest)
    threads = engine.get("num_threads") if isinstance(engine, dict) else None
    return {
        "schema": 1,
        "error": None,
        "experiment": 4,
        "lab_version": LAB_VERSION,
        "warmup": WARMUP,
        "repeats": len(runs) // len(RUNS),
        "order": [run.as_dict() for run in runs],
        "engine": {**ENGINE, "seed": manifest.get("seed"), "num_threads": threads if _is_count(threads) else None},
        "size": vars(size),
        "pools": {arm: size.pool(arm) for arm in ARMS},
        "prose": list(PROSE),
    }


def _shapes(found: Mapping[str, Any], wanted: Mapping[str, Callable[[Any], bool]], prefix: str) -> Iterator[Finding]:
    for name in sorted({*found, *wanted}):
        if name not in wanted:
            yield _finding(f"{prefix}{name}", found[name], "(no such field)")
        elif name not in found:
            yield _finding(f"{prefix}{name}", MISSING, "what the run wrote")
        elif not wanted[name](found[name]):
            yield _finding(f"{prefix}{name}", found[name], "a value that a run writes")


def check_recorded(manifest: Mapping[str, Any], recorded: list[RecordedRun]) -> Iterator[Finding]:
    """A manifest of sound shape against what every recording says of itself. At least one is needed."""
    for run in recorded:
        for path, found, value in differences(manifest["run"], header_facts(run), "run"):
            yield _finding(f"{path} ({run.planned.name})", found, value)
    header = header_facts(recorded[0])
    for name in ("seed", "command", "version"):
        if manifest[name] != header[name]:
            yield _finding(name, manifest[name], header[name])
    knobs = {**header, **header["knobs"], "watermark": header["knobs"].get("watermark_blocks")}
    yield from (_finding(f"run {name}", knobs.get(name), v) for name, v in ENGINE.items() if knobs.get(name) != v)
    machine = manifest["environment"]
    yield from _pairs(manifest, machine, header)
    yield from _times(manifest, recorded, header["label"])


def _pairs(manifest: Mapping[str, Any], machine: Mapping[str, Any], header: Mapping[str, Any]) -> Iterator[Finding]:
    """Two places that tell of one fact."""
    shape = TOKEN_BYTES.fullmatch(machine["kv_shape"])
    told = int(shape[1].replace(",", "")) if shape else 0
    if told * header["block_size"] != header["block_bytes"]:
        yield _finding("environment.kv_shape", machine["kv_shape"], f"{header['block_bytes']} B a block")
    label = "simulated" if machine["device"] == "none" else "measured"
    if header["label"] != label:
        yield _finding("run.label", header["label"], label)
    threads = manifest["engine"]["num_threads"]
    if threads is not None and machine["num_threads"] not in (0, threads):
        yield _finding("environment.num_threads", machine["num_threads"], threads)
    if "--seed" not in (command := manifest["command"]):  # not written by the command line
        return
    wanted = {
        f"--seed {manifest['seed']} --repeats {manifest['repeats']} --lang {manifest['lang']}": True,
        "--quick": manifest["quick"],
        "--simulated": label == "simulated",
    }
    for flag, is_given in wanted.items():
        if (flag in command) != is_given:
            yield _finding("command", command, f"{'' if is_given else 'no '}{flag}")


def _times(manifest: Mapping[str, Any], recorded: list[RecordedRun], label: str) -> Iterator[Finding]:
    """The runs lie between `started` and `finished`."""
    taken = datetime.fromisoformat(manifest["finished"]) - datetime.fromisoformat(manifest["started"])
    ends = [(run.replay.recording.start_ns, run.replay.recording.end_ns) for run in recorded]
    span_ns = max(end for _, end in ends) - min(start for start, _ in ends) if label == "measured" else 0
    if taken < max(timedelta(0), timedelta(microseconds=span_ns / 1000) - SLACK):
        yield _finding("finished", manifest["finished"], f"{span_ns / 1e9:.0f} s or more after {manifest['started']}")


def _finding(path: str, found: Any, wanted: Any) -> Finding:
    return Finding("manifest", f"{MANIFEST} {path}", str(found)[:160], str(wanted)[:160])
