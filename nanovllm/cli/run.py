"""`nanovllm run MODEL PROMPT`: one question, its answer streamed to stdout.

What it is: the verb. What it knows nothing about: how the engine works. Invariant:
stdout holds the answer alone, or with --json one JSON document; all else is stderr's.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanovllm.cli.flags import Setup, with_engine_flags, with_sampling_flags
from nanovllm.cli.session import answer, open_llm
from nanovllm.cli.terminal import note, write_answer
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import InvalidRequestError
from nanovllm.observe.timeline_view import render

if TYPE_CHECKING:
    from nanovllm.engine.outputs import RequestOutput

MODEL_HELP = "smollm2 (pulled at first use), a directory, a .gguf file, a hub id org/name, or tiny:random."


@with_engine_flags
@with_sampling_flags
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question; '-' reads it from stdin.")] = "-",
    *,
    system: Annotated[str | None, typer.Option("--system", help="Instructions put before the question.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is; apply no chat template.")] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Print where the time went, on stderr.", rich_help_panel="Output")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document at the end.", rich_help_panel="Output")
    ] = False,
    sampling: SamplingParams,
    setup: Setup,
) -> None:
    """Ask MODEL one question and stream the answer.

    The prompt goes through the model's chat template if it has one; --raw leaves it as it is.
    """
    if raw and system is not None:
        raise InvalidRequestError("--system needs the chat template.", param="system", hint="Leave --raw out.")
    text = _read_prompt(prompt)
    if not text:
        raise InvalidRequestError("The prompt is empty.", param="prompt", hint="Give at least one character.")
    with open_llm(model, setup, "run") as llm:
        is_chat = not raw and llm.tokenizer.chat_template is not None
        final = answer(llm, conversation(text, system) if is_chat else text, sampling, shown=not as_json)
    if as_json:
        print(json.dumps(document(model, final), allow_nan=False))
    else:
        write_answer("\n")
    if timeline:
        note("\n" + summary(final) + "\n" + render(final.timeline))


def conversation(text: str, system: str | None) -> list[dict[str, Any]]:
    """The messages of a first question."""
    instructions = [] if system is None else [{"role": "system", "content": system}]
    return [*instructions, {"role": "user", "content": text}]


def summary(final: RequestOutput) -> str:
    """The request in one line: what entered, what came out."""
    added = "" if final.template_tokens is None else f", {final.template_tokens} of them the chat template's"
    return (
        f"{final.request_id}: {final.prompt_len} prompt tokens{added}; {final.cached_tokens} cached; "
        f"{len(final.token_ids)} generated; finish_reason {final.finish_reason}"
    )


def document(model: str, final: RequestOutput) -> dict[str, Any]:
    """The finished request as plain data."""
    return {
        "model": model,
        "request_id": final.request_id,
        "text": final.text,
        "token_ids": final.token_ids,
        "finish_reason": final.finish_reason,
        "prompt_len": final.prompt_len,
        "cached_tokens": final.cached_tokens,
        "template_tokens": final.template_tokens,
        "timeline": final.timeline.as_dict(),
    }


def _read_prompt(prompt: str) -> str:
    """The prompt as given, or stdin's text without its last newline."""
    if prompt != "-":
        return prompt
    if sys.stdin.isatty():
        raise InvalidRequestError(
            "There is no prompt.", param="prompt", hint='Write it after the model: nanovllm run smollm2 "Hello".'
        )
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"The prompt on stdin is not UTF-8 (byte {error.start}).", param="prompt", hint="Convert it to UTF-8."
        ) from None
