"""`nanovllm`: the command line. Verbs live in a file each; failures become one sentence here.

What it is: the typer app and the process's exit code. What it knows nothing about:
what the verbs do. Invariants: no traceback reaches a user unless NANOVLLM_DEBUG=1;
`--help` imports no torch; exit codes are 0 for done, 1 for a failure, 2 for input
that must be changed, 130 for Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from nanovllm import __version__
from nanovllm.cli.bench import bench
from nanovllm.cli.capacity import EXAMPLES as CAPACITY_EXAMPLES
from nanovllm.cli.capacity import capacity
from nanovllm.cli.chat import chat
from nanovllm.cli.doctor import doctor
from nanovllm.cli.flags import flag_of
from nanovllm.cli.lab import lab
from nanovllm.cli.probe import EXAMPLES as PROBE_EXAMPLES
from nanovllm.cli.probe import probe
from nanovllm.cli.pull import pull
from nanovllm.cli.run import run
from nanovllm.cli.serve import EXAMPLES as SERVE_EXAMPLES
from nanovllm.cli.serve import serve
from nanovllm.cli.state import state
from nanovllm.cli.terminal import harmless, make_streams_lenient
from nanovllm.cli.trace import trace
from nanovllm.errors import NanoVLLMError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

SETTINGS_HELP = """Start with:  nanovllm run smollm2 "Why is the sky blue?"

Engine settings come from four sources; a later one wins: the defaults; a TOML file \
(--config settings.toml); the environment (NANOVLLM_BLOCK_SIZE=32); flags (--block-size 32).

Exit codes: 0 done, 1 failed, 2 the input must be changed, 130 Ctrl-C.

NANOVLLM_DEBUG=1 shows tracebacks.
"""
RUN_EXAMPLES = """Examples:

  nanovllm run smollm2 "Why is the sky blue?" --timeline

  echo "Summarise: ..." | nanovllm run smollm2 - --max-tokens 100

  nanovllm run ./model.gguf "Once upon a time" --raw --temperature 0.8 --seed 7

  nanovllm run smollm2 "Hello" --json | python -m json.tool

  nanovllm run tiny:random "Hello" --log stage
"""
CHAT_EXAMPLES = """Examples:

  nanovllm chat smollm2

  nanovllm chat smollm2 --system "Answer in one sentence." --temperature 0.2

  printf 'Hello\\nAnd in French?\\n' | nanovllm chat smollm2

  nanovllm chat --url http://127.0.0.1:8000
"""
PULL_EXAMPLES = """Examples:

  nanovllm pull smollm2

  nanovllm pull Qwen/Qwen3-0.6B

  nanovllm pull HuggingFaceTB/SmolLM2-360M-Instruct-GGUF/smollm2-360m-instruct-q8_0.gguf

Files are kept in $NANOVLLM_CACHE, else ~/.cache/nanovllm; hub files in the hub's own cache.
"""
DOCTOR_EXAMPLES = """Examples:

  nanovllm doctor

  nanovllm doctor --json
"""

app = typer.Typer(
    name="nanovllm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=RUN_EXAMPLES)(run)
app.command(epilog=CHAT_EXAMPLES)(chat)
app.command(epilog=SERVE_EXAMPLES)(serve)
app.command(epilog=PULL_EXAMPLES)(pull)
app.command(epilog=DOCTOR_EXAMPLES)(doctor)
app.command(epilog=CAPACITY_EXAMPLES)(capacity)
app.command(epilog=PROBE_EXAMPLES)(probe)
app.add_typer(bench, name="bench")
app.add_typer(trace, name="trace")
app.add_typer(lab, name="lab")
app.add_typer(state, name="state")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nanovllm {__version__}")
        raise typer.Exit


@app.callback(epilog=SETTINGS_HELP)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """nano-vllm-hust: a small LLM inference engine whose long-lived state is first class."""


def main() -> None:
    """Run the command line and exit with its code."""
    make_streams_lenient()
    try:
        app(prog_name="nanovllm")
    except NanoVLLMError as error:
        _fail(sentence(error), error, BAD_INPUT if error.status == 400 else FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _forget_stdout()
        sys.exit(FAILED)
    except OSError as error:
        _forget_stdout()
        _fail(f"The output cannot be written: {error.strerror or error}.", error, FAILED)
    except Exception as error:  # noqa: BLE001  the last resort: one sentence instead of a traceback
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _fail(f"Internal error: {what}. Run with NANOVLLM_DEBUG=1 and report it.", error, FAILED)


def sentence(error: NanoVLLMError) -> str:
    """The failure for a person: what, which parameter, how to mend it."""
    param, text = error.param, str(error)
    names_it = param is None or param in text or flag_of(param) in text
    return text if names_it else f"{param}: {text}"


def _fail(text: str, error: Exception, code: int) -> None:
    if os.environ.get("NANOVLLM_DEBUG", "0") not in ("", "0"):
        raise error
    print(harmless(f"nanovllm: {text}"), file=sys.stderr)
    sys.exit(code)


def _forget_stdout() -> None:
    """Keep Python from flushing into the closed pipe once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
