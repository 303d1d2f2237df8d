"""What `--quantization int8` loses on real text and what it gains: perplexity, top-1 agreement, one stream's tokens/s.

    python benchmarks/quantization.py                    # default model, 20 windows of 1,024 tokens: about ten minutes
    python benchmarks/quantization.py --windows 2        # whether it works

All rows predict the same tokens of `texts.py`, window by window. Agreement is the share of places at which the
likeliest token is the one of the same weights in float32, so that what bfloat16 alone does stands in a row of its own.
Each kind of weight is measured in steps of a whole window, as prompts are computed; quantised ones in steps of FEW
tokens, too, which meet the same products as decode does: there their codes are read. bf16 has one product for both.

The default model's file is quantised already, with 4 bits in groups of 32. Groups of 8 bits over the same 32 inputs
would hit its values exactly and show no loss at all. So bf16 and int8 take its export with units in another order (the
same function, up to rounding): an 8-bit group then mixes weights of many 4-bit groups, as in a model never quantised.

Figures are `measured`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from command import at_least_one, told
from peers.weights import exported
from roofline import decoding, in_turn
from safetensors.torch import load_file, save_file
from texts import real_text

from nanovllm import LLM
from nanovllm.core.cache_dir import cache_dir
from nanovllm.engine.exec_batch import ExecBatch
from nanovllm.engine.sampling_batch import SamplingBatch
from nanovllm.kernels.grouped_linear import FEW
from nanovllm.models.loading import load_model_files
from nanovllm.models.model_config import ModelConfig

WINDOW = 1024
STREAM_CONTEXT, STREAM_LENGTH = 128, 512
QUIET_LOAD = 0.7  # load average from which on the machine is called busy


@dataclass(frozen=True)
class Arm:
    """One kind of weights in one arithmetic."""

    name: str
    settings: dict[str, Any]
    rows: tuple[int, ...] = (WINDOW, FEW)


@dataclass
class Score:
    """What a model made of the text: its loss in nats, and its likeliest token, at each place."""

    losses: list[torch.Tensor]
    tops: list[torch.Tensor]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(torch.cat(self.losses).double().mean().exp())

    def agreement(self, other: Score) -> float:
        """The share of places at which both have the same likeliest token."""
        return float((torch.cat(self.tops) == torch.cat(other.tops)).double().mean())


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=at_least_one, default=20, help=f"of {WINDOW} tokens")
    parser.add_argument("--threads", type=at_least_one, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=at_least_one, default=60, help="decode steps that are timed")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    weights, file = exported(args.model, cache_dir() / "peers")
    arms = arms_of(str(shuffled(weights)), file)
    rows = qualities(arms, text_windows(str(weights), args.windows))
    speeds = stream_speeds(arms[1:], args.repeats)
    print_table(rows, dict(speeds), load)
    settings = {"model": args.model, "windows": args.windows, "window": WINDOW, "threads": args.threads}
    machine = {"load_average_before": load, "instruction_set": torch.backends.cpu.get_cpu_capability()}
    print(json.dumps({"label": "measured", "rows": rows, "decode_tok_s": speeds, "settings": settings | machine}))


def arms_of(weights: str, file: Path | None) -> list[Arm]:
    """float32 first: what the others are compared with."""
    bf16 = {"model": weights, "dtype": "bfloat16"}
    own = [Arm("file", {"model": str(file), "dtype": "bfloat16"})] if file is not None else []
    exact = Arm("float32", {"model": weights, "dtype": "float32"}, rows=(WINDOW,))
    return [exact, Arm("bf16", bf16, rows=(WINDOW,)), Arm("int8", bf16 | {"quantization": "int8"}), *own]


def text_windows(model: str, count: int) -> list[list[int]]:
    """The first tokens of the text, in windows."""
    files = load_model_files(model)
    files.weights.close()
    ids = files.tokenizer.encode(real_text(count * WINDOW * 6))
    windows = [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]
    if len(windows[-1]) < WINDOW:
        raise SystemExit("there is not so much text")
    return windows


def qualities(arms: list[Arm], windows: list[list[int]]) -> list[dict[str, Any]]:
    """A row for each kind of weights and number of rows a step."""
    rows: list[dict[str, Any]] = []
    exact: Score | None = None
    for arm in arms:
        with opened(arm, length=len(windows[0]) + 1) as llm:
            for count in arm.rows:
                found = score(llm.engine.runner, windows, count)
                exact = exact or found
                row = {"weights": arm.name, "rows": count, "perplexity": round(found.perplexity, 4)}
                rows.append(row | {"agreement": round(found.agreement(exact), 5)})
                print(rows[-1], file=sys.stderr)
    return rows


def opened(arm: Arm, length: int) -> LLM:
    """An engine of its weights for one sequence."""
    blocks = -(-length // 16) + 1
    return LLM(**arm.settings, max_num_seqs=1, max_model_len=length, num_blocks=blocks, prefix_mode="off")


def score(runner: Any, windows: list[list[int]], rows: int) -> Score:
    """All windows, each computed `rows` tokens a step."""
    found = Score([], [])
    for ids in windows:
        successors = torch.tensor(ids[1:])
        for logits in logits_of(runner, ids, rows):
            wanted, successors = successors[: len(logits)], successors[len(logits) :]
            logits = logits[: len(wanted)].float()  # the last token of a window has no successor
            found.losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            found.tops.append(logits.argmax(dim=1))
    return found


@torch.inference_mode()
def logits_of(runner: Any, ids: list[int], rows: int) -> Iterator[torch.Tensor]:
    """Logits [n, vocab] of all tokens of one sequence, step by step; its KV takes the pool's first blocks."""
    table = np.arange(-(-len(ids) // runner.tier.pool.shape[4]))[None]
    for start in range(0, len(ids), rows):
        part = np.array(ids[start : start + rows])
        end = start + len(part)
        batch = ExecBatch(
            token_ids=part,
            positions=np.arange(start, end),
            query_lens=np.array([len(part)]),
            context_lens=np.array([end]),
            block_tables=table,
            samples=np.array([True]),
            sampling=SamplingBatch.build([]),
        )
        layout = runner.layout(batch)
        plan = runner.model.kernels.plan(layout, runner.tier.pool, runner.model.geometry)
        yield runner.model.forward(torch.from_numpy(part), layout.positions, plan, torch.arange(len(part)))


def stream_speeds(arms: list[Arm], repeats: int) -> dict[str, float]:
    """Tokens per second of one stream: medians of decode steps, the engines in turn."""
    engines = {arm.name: opened(arm, STREAM_LENGTH) for arm in arms}
    try:
        steps = {name: decoding(llm, 1, STREAM_CONTEXT, STREAM_LENGTH) for name, llm in engines.items()}
        return {name: round(1 / seconds, 1) for name, seconds in in_turn(steps, repeats).items()}
    finally:
        for llm in engines.values():
            llm.close()


def print_table(rows: list[dict[str, Any]], speeds: dict[str, float], load: float) -> None:
    """For a person."""
    print(f"{'weights':<9}{'rows a step':>12}{'perplexity':>12}{'top-1':>9}{'decode tok/s':>14}")
    for row in rows:
        speed = speeds.pop(row["weights"], "")
        agreement = f"{row['agreement']:.2%}"
        print(f"{row['weights']:<9}{row['rows']:>12}{row['perplexity']:>12}{agreement:>9}{speed:>14}")
    if load > QUIET_LOAD:
        print(f"busy machine: load {load:.1f} before the start, so the speeds are not to be trusted")


# -- the same model with its units in another order ---------------------------------------------------


def shuffled(home: Path) -> Path:
    """The model of directory `home` with hidden units, inner units and places within heads reordered; kept."""
    there = home.with_name(f"{home.name}-shuffled")
    if not there.exists():
        scratch = home.with_name(f"{there.name}.{os.getpid()}")
        shutil.copytree(home, scratch)
        files = load_model_files(str(home))
        files.weights.close()
        tensors = reordered(load_file(home / "model.safetensors"), files.config)
        save_file(tensors, scratch / "model.safetensors", {"format": "pt"})
        os.replace(scratch, there)
    return there


def reordered(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The same function: what one weight puts out in another order, the next one reads in it."""
    draw = torch.Generator().manual_seed(0)
    hidden, inner = (torch.randperm(n, generator=draw) for n in (config.hidden_size, config.intermediate_size))
    place = torch.randperm(config.head_dim, generator=draw)  # one order for all heads: several queries share a value

    def heads(count: int) -> torch.Tensor:
        return (torch.arange(count)[:, None] * config.head_dim + place).flatten()

    values, attended = heads(config.num_kv_heads), heads(config.num_heads)
    orders: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {  # of outputs, of inputs
        "q_proj": (None, hidden),
        "k_proj": (None, hidden),
        "v_proj": (values, hidden),
        "o_proj": (hidden, attended),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed_tokens": (None, hidden),
        "lm_head": (None, hidden),
        "norm": (hidden, None),
        "input_layernorm": (hidden, None),
        "post_attention_layernorm": (hidden, None),
    }
    out = {}
    for name, tensor in tensors.items():
        rows, columns = orders.get(name.split(".")[-2], (None, None))
        tensor = tensor if rows is None else tensor[rows]
        has_columns = columns is not None and tensor.dim() == 2
        out[name] = (tensor[:, columns] if has_columns else tensor).contiguous()
    return out


if __name__ == "__main__":
    told(main)
