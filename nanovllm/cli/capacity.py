"""`nanovllm capacity MODEL`: how much KV a request takes, how many fit, and what eats the rest.

What it is: the verb and its flags. What it knows nothing about: the arithmetic
(`observe/capacity.py`). Invariants: the model's shape is read from its files and no
weight is; with --json stdout is one JSON document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nanovllm.config import parse_bytes
from nanovllm.errors import ConfigError

if TYPE_CHECKING:
    from nanovllm.lab.workloads import Workload
    from nanovllm.models.model_config import ModelConfig
    from nanovllm.observe.capacity_report import CapacityQuestion

EXAMPLES = """Examples:

  nanovllm capacity smollm2 --memory 4GiB --prompt 2048 --output 256

  nanovllm capacity smollm2 --memory 1GiB --prompt 512 --output 128 --shared-prefix 400

  nanovllm capacity smollm2 --memory 1GiB --compare contiguous --workload mixed_ctx --plot waste.svg

  nanovllm capacity tiny:random --memory 1MiB --prompt 100 --output 50 --json
"""
MODEL_HELP = "smollm2, a directory, a .gguf file, a hub id org/name, or tiny:random."
POOL, REQUEST, COMPARE, OUTPUT = "Pool", "Request", "Compare", "Output"
MOST = 2**31


def _flag(name: str, text: str, panel: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, **more)


def capacity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    *,
    memory: Annotated[str, _flag("--memory", "Memory for KV, bytes or '4GiB'.", POOL)] = "4GiB",
    with_weights: Annotated[bool, _flag("--with-weights", "--memory holds the weights too.", POOL)] = False,
    block_size: Annotated[int, _flag("--block-size", "Tokens a block holds.", POOL, min=1, max=MOST)] = 16,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], _flag("--dtype", "Type of KV numbers; auto as the engine.", POOL)
    ] = "auto",
    max_model_len: Annotated[
        int | None, _flag("--max-model-len", "Longest request, tokens (default: the model's).", POOL, min=1, max=MOST)
    ] = None,
    prompt: Annotated[int, _flag("--prompt", "Prompt tokens of a request.", REQUEST, min=1, max=MOST)] = 2048,
    output: Annotated[int, _flag("--output", "Output tokens of a request.", REQUEST, min=1, max=MOST)] = 256,
    shared_prefix: Annotated[
        int, _flag("--shared-prefix", "Prompt tokens that all requests begin with.", REQUEST, min=0, max=MOST)
    ] = 0,
    compare: Annotated[
        Literal["contiguous"] | None,
        _flag("--compare", "Replay a workload under contiguous reservations and under pages.", COMPARE),
    ] = None,
    workload: Annotated[
        str,
        _flag("--workload", "Which; --prompt is its length, in mixed_ctx of the long quarter.", COMPARE),
    ] = "mixed_ctx",
    requests: Annotated[
        int, _flag("--requests", "Sessions of the workload, all there at once.", COMPARE, min=1, max=10**5)
    ] = 200,
    seed: Annotated[int, _flag("--seed", "Same seed, same workload.", COMPARE, min=0, max=2**32)] = 0,
    plot: Annotated[
        Path | None, _flag("--plot", "Draw the comparison to this .png or .svg file.", COMPARE, metavar="FILE")
    ] = None,
    as_json: Annotated[bool, _flag("--json", "Print one JSON document.", OUTPUT)] = False,
) -> None:
    """Compute what KV takes and how many requests fit: token-exact, block-exact, and by block size.

    Nothing is loaded and nothing runs: figures are estimated. --compare replays allocations: simulated.
    """
    memory_bytes = parse_bytes(memory, "memory")
    if plot is not None and compare is None:
        raise ConfigError("plot draws a comparison.", param="plot", hint="Add --compare contiguous.")
    if shared_prefix > prompt:
        raise ConfigError(
            f"shared_prefix ({shared_prefix}) is longer than the prompt ({prompt}).", param="shared_prefix"
        )
    given = locals()
    report = _report(model, dtype, memory_bytes, with_weights, given)
    if compare is not None:
        report |= {"compare": _compare(report, given)}
    if as_json:
        print(json.dumps(report, allow_nan=False))
    else:
        from nanovllm.cli.capacity_view import print_report

        print_report(report)


def _report(model: str, dtype: str, memory_bytes: int, with_weights: bool, given: dict[str, Any]) -> dict[str, Any]:
    """The document, and beside it what weights and free memory have to say."""
    from nanovllm.observe.capacity_report import document

    config, dtype, dtype_bytes = _shape_of(model, dtype)
    weight_bytes = config.parameter_count() * dtype_bytes
    kv_bytes = memory_bytes - weight_bytes if with_weights else memory_bytes
    question = _question(model, config, dtype, dtype_bytes, kv_bytes, given)
    if kv_bytes < question.pool.block_bytes:
        raise ConfigError(
            f"memory of {memory_bytes:,} bytes leaves {max(kv_bytes, 0):,} for KV: no block of "
            f"{question.pool.block_bytes:,} bytes fits.",
            param="memory",
            hint="Give more memory, or a smaller block_size.",
        )
    return document(question) | {"weights": _weights(config, dtype_bytes, weight_bytes, kv_bytes, with_weights)}


def _compare(report: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The replays' document; their picture is drawn on the way."""
    from nanovllm.lab.allocation_replay import compare_contiguous

    path: Path | None = given["plot"]
    if path is not None:
        from nanovllm.lab.allocation_plot import check_plot_path

        check_plot_path(path)
    document, replays = compare_contiguous(
        _workload(given),
        report["pool"]["num_blocks"],
        given["block_size"],
        max_len=report["concurrency"]["reserve_max_tokens"],
        guess=given["output"],
    )
    if path is not None:
        from nanovllm.lab.allocation_plot import plot

        plot(replays, document, path)
    return document


def _workload(given: dict[str, Any]) -> Workload:
    """The named workload in the lengths that were asked for."""
    from nanovllm.lab.workloads import generate

    name, prompt = given["workload"], given["prompt"]
    lengths = {"length": max(1, prompt // 8), "long_len": prompt} if name == "mixed_ctx" else {"length": prompt}
    return generate(name, seed=given["seed"], sessions=given["requests"], output_len=given["output"], **lengths)


def _shape_of(model: str, dtype: str) -> tuple[ModelConfig, str, int]:
    """The model's configuration, and name and bytes of the type its KV would have. No weight is read."""
    from nanovllm.kernels.selection import choose_device, choose_dtype
    from nanovllm.models.loading import load_model_files

    loaded = load_model_files(model)
    loaded.weights.close()
    chosen = choose_dtype(dtype, choose_device("auto"))
    return loaded.config, str(chosen).removeprefix("torch."), chosen.itemsize


def _question(
    model: str, config: ModelConfig, dtype: str, dtype_bytes: int, kv_bytes: int, given: dict[str, Any]
) -> CapacityQuestion:
    from nanovllm.observe.capacity import KVShape, RequestShape
    from nanovllm.observe.capacity_report import CapacityQuestion

    return CapacityQuestion(
        model=model,
        dtype=dtype,
        shape=KVShape(config.num_layers, config.num_kv_heads, config.head_dim, dtype_bytes),
        request=RequestShape(given["prompt"], given["output"]),
        memory_bytes=kv_bytes,
        block_size=given["block_size"],
        max_model_len=given["max_model_len"] or config.max_position_embeddings,
        shared_prefix=given["shared_prefix"],
    )


def _weights(
    config: ModelConfig, dtype_bytes: int, weight_bytes: int, kv_bytes: int, with_weights: bool
) -> dict[str, Any]:
    """What the weights take beside the pool, and whether this machine has room for both."""
    from nanovllm.engine.build import free_memory
    from nanovllm.kernels.selection import choose_device

    free_bytes = free_memory(choose_device("auto"))
    return {
        "label": "estimated",
        "parameters": config.parameter_count(),
        "bytes_per_parameter": dtype_bytes,
        "bytes": weight_bytes,
        "inside_memory": with_weights,
        "free_memory_bytes": free_bytes,
        "free_memory_label": "measured",
        "fits_here": weight_bytes + kv_bytes <= free_bytes,
    }
