"""`nanovllm bench serve`: load on an OpenAI-compatible server, and what it did under it.

What it is: the verb and its flags. What it knows nothing about: how requests are sent
(`lab/load.py`), what the metrics mean (`lab/outcome.py`, `lab/load_report.py`).
Invariants: the last line of stdout is one JSON document; the exit code is 1 when a
request failed for another reason than rejection; progress is shown on a terminal only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nanovllm.cli.remote import SERVER_PANEL, ApiKey, ServerModel
from nanovllm.lab.serve_bench import BenchSettings, measure

if TYPE_CHECKING:
    from tqdm import tqdm

EXAMPLES = """Examples:

  nanovllm bench serve --num-requests 100 --concurrency 8

  nanovllm bench serve --request-rate 4 --input-len 256 --output-len 64 --slo ttft:500 --slo tpot:50

  nanovllm bench serve --url http://127.0.0.1:8080 --endpoint completions --prompts questions.jsonl

  nanovllm bench serve --workload rag --num-requests 64 --concurrency 8

  nanovllm bench serve --request-rate 8 --burstiness 0.5 --prefix-len 512 --warmup 4 --json

Open loop: requests come at their time, whether or not earlier ones were answered. Closed loop (--concurrency): \
so many are under way at any time.
"""
PROMPTS, LOAD, OUTPUT = "Prompts and answers", "Load", "Output"
MOST = 10**7

bench = typer.Typer(no_args_is_help=True)


def _flag(name: str, text: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, **more)


Endpoint = Annotated[Literal["chat", "completions"], _flag("--endpoint", "Which of the two APIs to load.", PROMPTS)]
InLen = Annotated[
    int | None, _flag("--input-len", "Words a prompt, about a token each (default: 128).", PROMPTS, min=1, max=MOST)
]
OutLen = Annotated[int, _flag("--output-len", "Longest answer, tokens.", PROMPTS, min=1, max=MOST)]
Ratio = Annotated[float | None, _flag("--range-ratio", "Lengths vary by this share, up and down.", PROMPTS)]
Prefix = Annotated[
    int | None, _flag("--prefix-len", "Words all prompts begin with, besides their own.", PROMPTS, min=1, max=MOST)
]
Vocab = Annotated[
    int | None, _flag("--vocab", "Token ids below this instead of words: exact lengths.", PROMPTS, min=1, max=MOST)
]
WorkloadName = Annotated[
    str | None, _flag("--workload", "The lab's: short_ctx long_ctx mixed_ctx rag multi_tenant bursty.", PROMPTS)
]
PromptFile = Annotated[
    Path | None,
    _flag("--prompts", "One prompt a line: text, or JSON with prompt or messages.", PROMPTS, metavar="FILE"),
]
Temperature = Annotated[float, _flag("--temperature", "0 is greedy.", PROMPTS, min=0, max=100)]
IgnoreEos = Annotated[bool, _flag("--ignore-eos", "Ask for full length, where the server knows that.", PROMPTS)]
Requests = Annotated[
    int | None, _flag("--num-requests", "How many (default: 100, or all of FILE).", LOAD, min=1, max=MOST)
]
Rate = Annotated[float | None, _flag("--request-rate", "Open loop: arrivals a second (default: inf, at once).", LOAD)]
Burst = Annotated[float, _flag("--burstiness", "1: Poisson arrivals; below: bursts; above: more even.", LOAD)]
Closed = Annotated[
    int | None, _flag("--concurrency", "Closed loop: requests under way at any time.", LOAD, min=1, max=MOST)
]
Warmup = Annotated[int, _flag("--warmup", "Requests before the measured ones, one by one.", LOAD, min=0, max=MOST)]
Timeout = Annotated[float, _flag("--timeout", "Longest time one request may take, seconds.", LOAD)]
Seed = Annotated[int, _flag("--seed", "Same seed, same prompts and arrival times.", LOAD, min=0, max=2**32)]
Slo = Annotated[
    list[str] | None,
    _flag("--slo", "An objective in milliseconds: ttft:500, tpot:50 or e2e:5000; may be repeated.", OUTPUT),
]
Json = Annotated[bool, _flag("--json", "Print the JSON document alone.", OUTPUT)]


@bench.callback()
def root() -> None:
    """Measure a server from outside."""


@bench.command(epilog=EXAMPLES)
def serve(
    url: Annotated[str, _flag("--url", "Where it is.", SERVER_PANEL)] = BenchSettings.url,
    model: ServerModel = None,
    api_key: ApiKey = None,
    endpoint: Endpoint = "chat",
    num_requests: Requests = None,
    request_rate: Rate = None,
    burstiness: Burst = BenchSettings.burstiness,
    concurrency: Closed = None,
    warmup: Warmup = 0,
    timeout: Timeout = BenchSettings.timeout,
    seed: Seed = 0,
    input_len: InLen = None,
    output_len: OutLen = BenchSettings.output_len,
    range_ratio: Ratio = None,
    prefix_len: Prefix = None,
    vocab: Vocab = None,
    workload: WorkloadName = None,
    prompts: PromptFile = None,
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = False,
    slo: Slo = None,
    as_json: Json = False,
) -> None:
    """Send streamed requests to an OpenAI-compatible server; report latency, throughput and goodput.

    For nanovllm serve, vLLM, llama.cpp and others. Completed, rejected (429, 503) and failed are counted apart.
    """
    given = {**locals(), "slo": tuple(slo or ())}
    settings = BenchSettings(**{name: value for name, value in given.items() if name not in ("api_key", "as_json")})
    with _progress() as bar:
        document = measure(settings, api_key, lambda total: _counted(bar, total))
    if not as_json:
        from nanovllm.cli.bench_view import print_report

        print_report(document)
    print(json.dumps(document, allow_nan=False))
    if document["requests"]["failed"]:
        raise typer.Exit(1)


def _progress() -> tqdm[Any]:
    """A bar on stderr; nothing where that is no terminal."""
    from tqdm import tqdm

    return tqdm(unit=" requests", file=sys.stderr, disable=None, leave=False)


def _counted(bar: tqdm[Any], total: int) -> Callable[[], None]:
    bar.reset(total)

    def one_more() -> None:
        bar.update()

    return one_more
