"""Diagnosis: what a request, a window or a run spent its time on, and on whose account.

What it is: the pieces of `attribution.py` summed up, a verdict, the evidence rows behind
it, and what would refute it. What it knows nothing about: how to mend anything, prose.
Invariants: confidence is a plain share of time; a healthy run has no dominant cause; where
two causes are of one size both are named; each evidence row carries its record's number.

The verdict is one rule. A delay counts from DELAY_SHARE of the time on; a request's own prefill, which it cannot
do without, and a decode slower than the run's fastest from OWN_SHARE on. The largest that counts is dominant
unless another that counts has at least MIXTURE of its time: then it is a mixture of these. Two causes that one wait
needed both share its time, and are judged by all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.observe.attribution import CLASSES, WORK, Attribution, Piece
from nanovllm.observe.paths import Replay, RequestPath
from nanovllm.observe.perfetto import stage_spans

DELAY_SHARE, OWN_SHARE, MIXTURE = 0.25, 0.5, 0.5
OWN = ("prefill", "decode")
MOST_ROWS, MOST_CULPRITS, MOST_OUTLIERS = 5, 3, 3
DOMINANT, MIXED, HEALTHY = "dominant cause", "mixture", "no dominant cause"


def diagnose(
    run: Replay, *, request: str | None = None, from_ns: int | None = None, to_ns: int | None = None
) -> dict[str, Any]:
    """The diagnosis of one request, of the window [from, to) in nanoseconds after the start, or of the whole run.

    Raises InvalidRequestError on a request that the run does not have, on an empty window, and on one in which
    nothing that is asked about was there.
    """
    attribution, start_ns = Attribution(run), run.recording.start_ns
    if request is not None and request not in run.paths:
        raise InvalidRequestError(f"The recording has no request {request!r}.", param="request")
    window = (start_ns + (from_ns or 0), run.recording.end_ns if to_ns is None else start_ns + to_ns)
    if to_ns is not None and to_ns <= (from_ns or 0):
        raise InvalidRequestError("The window is empty.", param="from", hint="--from must lie before --to.")
    names = [request] if request is not None else list(run.paths)
    if from_ns is not None or to_ns is not None:
        _check_window(attribution, names, window)
    found = _judge(attribution, names, window)
    scope = {"request": request, "from_ns": window[0] - start_ns, "to_ns": window[1] - start_ns}
    document = {"label": run.recording.label, "scope": scope, **found, "remarks": run.recording.remarks}
    return document if request is not None else {**document, "outliers": _outliers(attribution, window, found)}


def _check_window(attribution: Attribution, names: list[str], window: tuple[int, int]) -> None:
    """Refuse a window that lies wholly outside the lives of `names`."""
    pieces = [piece for name in names for piece in attribution.pieces[name]]
    if not pieces or any(piece.end_ns > window[0] and piece.start_ns < window[1] for piece in pieces):
        return
    start_ns = attribution.run.recording.start_ns
    first, last = min(p.start_ns for p in pieces) - start_ns, max(p.end_ns for p in pieces) - start_ns
    whose = f"Request {names[0]!r}" if len(names) == 1 else "The run's requests"
    begin, end = ((moment - start_ns) / 1e9 for moment in (window[0], max(window)))
    lived = f"{whose} lived from {first / 1e9:.3f} s to {last / 1e9:.3f} s"
    raise InvalidRequestError(
        f"{lived}: nothing of it lies between {begin:.3f} s and {end:.3f} s.",
        param="from",
        hint="Give --from and --to in seconds after the run's start, within that span.",
    )


def brief(run: Replay) -> dict[str, Any]:
    """The verdict on the whole run and the share of each cause it names."""
    found = diagnose(run)
    causes = {cause["cause"]: cause["share"] for cause in found["causes"] if cause["is_named"]}
    return {"label": found["label"], "verdict": found["verdict"], "causes": causes}


def named(found: dict[str, Any]) -> list[str]:
    """The causes that a diagnosis names, largest first."""
    return [cause["cause"] for cause in found["causes"] if cause["is_named"]]


def _judge(attribution: Attribution, names: list[str], window: tuple[int, int]) -> dict[str, Any]:
    pieces = [piece for name in names for piece in _clipped(attribution.pieces[name], window)]
    times, weights = Counter[str](), Counter[str]()
    for piece in pieces:
        times[piece.cause] += piece.end_ns - piece.start_ns
        for cause in filter(None, (piece.cause, piece.beside)):
            weights[cause] += piece.end_ns - piece.start_ns
    total_ns = sum(times.values())
    ranked = [(cause, ns) for cause, ns in times.most_common() if cause != WORK]
    count = [
        (cause, ns)
        for cause, ns in weights.most_common()
        if cause in dict(ranked) and ns >= total_ns * (OWN_SHARE if cause in OWN else DELAY_SHARE)
    ]
    largest_ns = count[0][1] if count else 0
    chosen = [cause for cause, ns in count if ns >= largest_ns * MIXTURE]
    return {
        "requests": len(names),
        "total_ns": total_ns,
        "verdict": HEALTHY if not chosen else DOMINANT if len(chosen) == 1 else MIXED,
        "dominant_stage": _dominant_stage(attribution.run, names, window),
        "work_share": _share(times[WORK], total_ns),
        "causes": [_cause(attribution, cause, ns, total_ns, pieces, cause in chosen) for cause, ns in ranked],
    }


def _cause(
    attribution: Attribution, cause: str, ns: int, total_ns: int, pieces: list[Piece], named: bool
) -> dict[str, Any]:
    """One cause: its time, whose doing it was, and for those that are named the records that tell it."""
    own = sorted((p for p in pieces if p.cause == cause), key=lambda p: p.start_ns - p.end_ns)
    behind = Counter[str]()
    for piece in own:
        for name in piece.behind:
            behind[name] += piece.end_ns - piece.start_ns
    return {
        "cause": cause,
        "class": CLASSES[cause],
        "time_ns": ns,
        "share": _share(ns, total_ns),
        "is_named": named,
        "beside": sorted({piece.beside for piece in own if piece.beside}),
        "behind": [{"request": name, "time_ns": time} for name, time in behind.most_common(MOST_CULPRITS)],
        "evidence": _evidence(attribution, own) if named else [],
    }


def _evidence(attribution: Attribution, pieces: list[Piece]) -> list[dict[str, Any]]:
    """The records that tell the most of a cause's time."""
    times = Counter[int]()
    for piece in pieces:
        times[piece.seq] += piece.end_ns - piece.start_ns
    wanted = dict(times.most_common(MOST_ROWS))
    events = {event.seq: event for event in attribution.run.recording.events if event.seq in wanted}
    rows = []
    for seq, ns in wanted.items():
        event = events[seq]
        told = {name: value for name, value in event._asdict().items() if name not in ("seq", "ts_ns", "block_ns")}
        holders = attribution.holders(event.ts_ns) if told.get("need_blocks") else {}
        largest = dict(sorted(holders.items(), key=lambda pair: -pair[1])[:MOST_CULPRITS])
        at_ns = event.ts_ns - attribution.run.recording.start_ns
        rows.append({"record": seq, "at_ns": at_ns, "explains_ns": ns, "told": told, "blocks_held": largest})
    return rows


def _outliers(attribution: Attribution, window: tuple[int, int], whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The slowest to their first token whose own diagnosis is another one than the whole's."""
    paths = [path for path in attribution.run.paths.values() if path.timeline.ttft_ns is not None]
    slowest = sorted(paths, key=lambda path: -(path.timeline.ttft_ns or 0))[: 4 * MOST_OUTLIERS]
    found = []
    for path in slowest:
        own = _judge(attribution, [path.name], window)
        causes = named(own)
        if causes and not set(causes) & set(named(whole)):
            share = next(cause["share"] for cause in own["causes"] if cause["is_named"])
            found.append({"request": path.name, "ttft_ns": path.timeline.ttft_ns, "causes": causes, "share": share})
    return found[:MOST_OUTLIERS]


def _clipped(pieces: Iterable[Piece], window: tuple[int, int]) -> list[Piece]:
    cut = [p._replace(start_ns=max(p.start_ns, window[0]), end_ns=min(p.end_ns, window[1])) for p in pieces]
    return [piece for piece in cut if piece.end_ns > piece.start_ns]


def _dominant_stage(run: Replay, names: list[str], window: tuple[int, int]) -> dict[str, Any] | None:
    """The term of design section 4 that took most of the time; None where nobody came that far."""
    times = Counter[str]()
    for name in names:
        for stage, start_ns, end_ns in _stages(run.paths[name]):
            times[stage] += max(0, min(end_ns, window[1]) - max(start_ns, window[0]))
    total_ns = sum(times.values())
    if not total_ns:
        return None
    stage, ns = times.most_common(1)[0]
    return {"stage": stage, "time_ns": ns, "share": _share(ns, total_ns)}


def _stages(path: RequestPath) -> list[tuple[str, int, int]]:
    """The terms, and for a request that was never launched its wait."""
    if path.timeline.launch_ns is not None or not path.waits:
        return stage_spans(path)
    return [("T_queue", path.timeline.arrival_ns, path.waits[-1].end_ns)]


def _share(ns: int, total_ns: int) -> float:
    return round(ns / total_ns, 4) if total_ns else 0.0
