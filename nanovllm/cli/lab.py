"""`nanovllm lab`: an experiment of the course run from one command, and its bundle checked.

What it is: the verbs and their flags. What it knows nothing about: what an experiment
does (`lab/experiment_4`). Invariants: progress goes to stderr; prose comes in English or
Chinese, identifiers stay English; the exit code of `check` is 1 where anything is found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanovllm.cli.lab_cache import EXAMPLES as CACHE_EXAMPLES
from nanovllm.cli.lab_cache import cache
from nanovllm.errors import InvalidRequestError

EXAMPLES = """Examples:

  nanovllm lab run 4 --out runs/kv

  nanovllm lab run 4 --out runs/quick --quick --lang zh

  nanovllm lab run 4 --out runs/mine --observer starter/state_counter.py:StateCounter

  nanovllm lab run 4 --out runs/virtual --simulated

  nanovllm lab check 4 runs/kv

  nanovllm lab check 4 runs/kv --submission
"""
EXPERIMENTS = (4,)

lab = typer.Typer(no_args_is_help=True, help="Run an experiment of the course, check its evidence.")

Experiment = Annotated[int, typer.Argument(metavar="EXPERIMENT", help="Its number: 4.")]
Language = Annotated[Literal["en", "zh"], typer.Option("--lang", help="Language of prose; identifiers stay English.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _flag(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, **more)


@lab.command(epilog=EXAMPLES)
def run(
    experiment: Experiment,
    *,
    out: Annotated[Path, _flag("--out", "A new folder for the bundle; never overwritten.", show_default=False)],
    quick: Annotated[bool, _flag("--quick", "Shorter contexts: under a minute on two cores.")] = False,
    simulated: Annotated[bool, _flag("--simulated", "No model, a virtual clock: the same figures everywhere.")] = False,
    model: Annotated[
        str | None,
        _flag("--model", "smollm2 (the default), a path, a hub id or tiny:random.", show_default=False),
    ] = None,
    observer: Annotated[
        str | None, _flag("--observer", "Your state counter or probe.", metavar="FILE.py:NAME", show_default=False)
    ] = None,
    seed: Annotated[int, _flag("--seed", "Same seed, same requests.", min=0, max=2**32)] = 0,
    repeats: Annotated[int, _flag("--repeats", "Runs of each case and arm, in alternating order.", min=3, max=9)] = 3,
    num_threads: Annotated[
        int | None, _flag("--num-threads", "CPU threads (default: the machine's cores).", min=1, show_default=False)
    ] = None,
    lang: Language = "en",
) -> None:
    """Run an experiment and leave its evidence in a bundle."""
    _known(experiment)
    if simulated and model is not None:
        hint = "Leave one of the two out."
        raise InvalidRequestError("--simulated runs no model: --model cannot be followed.", param="model", hint=hint)
    from nanovllm.lab.experiment_4.run import Settings, run_experiment
    from nanovllm.lab.student_observer import Observation

    observation = None if observer is None else Observation(observer)
    settings = Settings(None if simulated else model or Settings.model, quick, seed, repeats, lang, num_threads)
    command = _command(experiment, out, settings, observation)
    tables = run_experiment(out, settings, observation, command=command, progress=_progress)
    from nanovllm.cli.lab_view import print_tables

    print_tables(tables, out, lang)


@lab.command(epilog=EXAMPLES)
def check(
    experiment: Experiment,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that lab run made.")],
    *,
    submission: Annotated[bool, _flag("--submission", "Check what a student hands in, too.")] = False,
    as_json: Json = False,
    lang: Language = "en",
) -> None:
    """Compute every figure of a bundle again from its raw logs, and hold the rest to the sheet's rules."""
    _known(experiment)
    from nanovllm.cli.lab_view import print_verdict
    from nanovllm.lab.experiment_4.check import check_bundle

    verdict = check_bundle(bundle, handed_in=submission)
    if as_json:
        print(json.dumps(verdict.as_dict(lang), allow_nan=False, ensure_ascii=False))
    else:
        print_verdict(verdict, lang)
    if verdict.findings:
        raise typer.Exit(1)


lab.command(epilog=CACHE_EXAMPLES)(cache)


def _known(experiment: int) -> None:
    if experiment not in EXPERIMENTS:
        hint = f"There are: {', '.join(map(str, EXPERIMENTS))}."
        raise InvalidRequestError(f"There is no experiment {experiment} yet.", param="experiment", hint=hint)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _command(experiment: int, out: Path, settings: Any, observation: Any) -> str:
    """The command again, without this machine's folders."""
    model = "--simulated" if settings.model is None else f"--model {Path(settings.model).name}"
    parts = [f"nanovllm lab run {experiment} --out {out.name}", model]
    parts += ["--quick"] if settings.quick else []
    parts += [f"--seed {settings.seed} --repeats {settings.repeats} --lang {settings.lang}"]
    parts += [f"--num-threads {settings.num_threads}"] if settings.num_threads else []
    parts += [f"--observer {observation.path.name}:{observation.name}"] if observation else []
    return " ".join(parts)
