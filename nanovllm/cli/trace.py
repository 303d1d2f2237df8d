"""`nanovllm trace`: a recorded run looked at: shown, exported, compared, diagnosed. `record` is `trace_record.py`'s.

What it is: the verbs and their flags. What it knows nothing about: what records mean
(`observe/`). Invariants: a recording is read and never changed; with --json stdout is one
JSON document; prose comes in English or Chinese, identifiers stay English; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanovllm.cli.trace_record import record
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.paths import Replay, RequestPath, replay
from nanovllm.observe.recording import read_recording

EXAMPLES = """Examples:

  nanovllm run smollm2 "Why is the sky blue?" --events run.jsonl

  nanovllm trace show run.jsonl

  nanovllm trace show run.jsonl --request req-1

  nanovllm trace diagnose run.jsonl --lang zh

  nanovllm trace export run.jsonl --perfetto run.trace.json --svg run.svg

  nanovllm trace record mixed_ctx smollm2 --events fcfs.jsonl --num-blocks 200

  nanovllm trace record mixed_ctx smollm2 --events sjf.jsonl --num-blocks 200 --policy sjf

  nanovllm trace compare fcfs.jsonl sjf.jsonl
"""

trace = typer.Typer(no_args_is_help=True, help="Record a run, and look at it: stages, state, causes, comparison.")
trace.command(epilog=EXAMPLES)(record)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A recording made with --events.")]
Request = Annotated[str | None, typer.Option("--request", help="One request, by its id.")]
Objectives = Annotated[list[str] | None, typer.Option("--slo", help="ttft:500, tpot:50 or e2e:5000, for goodput.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Language = Annotated[Literal["en", "zh"], typer.Option("--lang", help="Language of prose; identifiers stay English.")]


@trace.command(epilog=EXAMPLES)
def show(
    file: File,
    *,
    request: Request = None,
    slo: Objectives = None,
    as_json: Json = False,
    lang: Language = "en",
) -> None:
    """Print a request's path through its stages, or without --request a table of all."""
    from nanovllm.cli import trace_view
    from nanovllm.observe.run_summary import request_row, summary
    from nanovllm.observe.statistics import parse_slo

    objectives, run = parse_slo(slo or []), _read(file)
    if request is not None:
        path = _path(run, request)
        row = {**request_row(path, run.recording.header), "remarks": run.recording.remarks}
        _print(as_json, lambda: row, lambda: trace_view.print_path(run, path, row, lang))
        return
    found = summary(run, objectives)
    rows = [request_row(path, run.recording.header) for path in run.paths.values()]
    _print(as_json, lambda: {**found, "paths": rows}, lambda: trace_view.print_run(rows, found))


@trace.command(epilog=EXAMPLES)
def export(
    file: File,
    *,
    perfetto: Annotated[Path | None, typer.Option("--perfetto", help="Chrome trace JSON, for ui.perfetto.dev.")] = None,
    mermaid: Annotated[Path | None, typer.Option("--mermaid", help="A request's sequence diagram as text.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="The same as a picture.")] = None,
    request: Request = None,
    lang: Language = "en",
) -> None:
    """Write a run as a trace, and one request (the first, or --request) as a sequence diagram."""
    from nanovllm.observe import sequence_diagram
    from nanovllm.observe.perfetto import chrome_trace

    if not (perfetto or mermaid or svg):
        raise InvalidRequestError("Nothing to write.", hint="Give --perfetto, --mermaid or --svg, each with a file.")
    run = _read(file)
    if perfetto:
        _write(perfetto, json.dumps(chrome_trace(run), allow_nan=False) + "\n")
    if mermaid or svg:
        path = _path(run, request or next(iter(run.paths), ""))
        for target, draw in ((mermaid, sequence_diagram.mermaid), (svg, sequence_diagram.svg)):
            if target:
                _write(target, draw(run, path, lang))


@trace.command(epilog=EXAMPLES)
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A recording.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another run of the same model.")],
    *,
    slo: Objectives = None,
    force: Annotated[bool, typer.Option("--force", help="Compare different models too.")] = False,
    as_json: Json = False,
    lang: Language = "en",
) -> None:
    """Set two runs of one model side by side: latencies, rates, state, cost, their ratios, and where the time went."""
    from nanovllm.cli import trace_causes_view
    from nanovllm.observe.diagnosis import brief
    from nanovllm.observe.run_summary import compare as compare_runs
    from nanovllm.observe.run_summary import summary
    from nanovllm.observe.statistics import parse_slo

    objectives, runs = parse_slo(slo or []), [_read(first), _read(second)]
    found = compare_runs(*(summary(run, objectives) for run in runs), force=force)
    found["diagnoses"] = [brief(run) for run in runs]
    _print(as_json, lambda: found, lambda: trace_causes_view.print_comparison(found, lang))


@trace.command(epilog=EXAMPLES)
def diagnose(
    file: File,
    *,
    request: Request = None,
    from_s: Annotated[float | None, typer.Option("--from", help="Seconds after the run's start.", min=0)] = None,
    to_s: Annotated[float | None, typer.Option("--to", help="Seconds after the run's start.", min=0)] = None,
    as_json: Json = False,
    lang: Language = "en",
) -> None:
    """Name what the time was spent on and on whose account, with records, and what would refute it."""
    from nanovllm.cli import trace_causes_view
    from nanovllm.observe.diagnosis import diagnose as diagnosed

    window = {"from_ns": _nanoseconds(from_s), "to_ns": _nanoseconds(to_s)}
    found = diagnosed(_read(file), request=request, **window)
    _print(as_json, lambda: found, lambda: trace_causes_view.print_diagnosis(found, lang))


def _read(file: Path) -> Replay:
    return replay(read_recording(file))


def _path(run: Replay, name: str) -> RequestPath:
    if name not in run.paths:
        known = ", ".join(list(run.paths)[:5]) or "it has none"
        raise InvalidRequestError(f"The recording has no request {name!r}.", param="request", hint=f"Known: {known}.")
    return run.paths[name]


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(min(seconds, 1e9) * 1e9)


def _print(as_json: bool, document: Callable[[], Any], view: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(document(), allow_nan=False))
    else:
        view()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}.", param="file") from error
