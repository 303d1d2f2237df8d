"""What a prefix costs that is restored instead of computed: TTFT cold, from host memory, and from disk.

    python benchmarks/state_restore.py                       # SmolLM2, 2,048 tokens; the last line is JSON
    python benchmarks/state_restore.py --quick               # 512 tokens, two repeats

One engine, one prompt per repeat. Its first request is the cold prefill; then the device forgets it and the same
prompt is asked again, its KV lying in host memory, on disk with the page cache warm, and on disk after the kernel
was asked to drop the files' pages (`posix_fadvise`). The four stand side by side within each repeat, so that
a machine that becomes slower meets all of them. Every answer must be the cold one's token. Figures are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from command import at_least_one, told
from talk import drop_pages
from tqdm import tqdm

from nanovllm import LLM, SamplingParams
from nanovllm.engine.outputs import RequestOutput

ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
CASES = ("cold", "host", "disk_warm", "disk_dropped")
EVERYTHING = 1 << 50


def main() -> None:
    """Measure and report."""
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, engine(args, folder) as llm:
        llm.generate([prompt_of(llm, 64, 0)], ONE_TOKEN)  # warm up
        numbers = tqdm(range(1, args.repeats + 1), unit="repeat", desc="repeats")
        rows = [one_repeat(llm, prompt_of(llm, args.tokens, number), Path(folder)) for number in numbers]
        report(args, llm, rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=at_least_one, default=2048, help="length of the prompt")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=at_least_one, default=None)
    parser.add_argument(
        "--folder", default=None, help="where the state folder is made; default: the system's temporary one"
    )
    parser.add_argument("--quick", action="store_true", help="512 tokens, two repeats")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.repeats = 512, 2
    return args


def engine(args: argparse.Namespace, folder: str) -> LLM:
    """State on every tier; loads are not left to the estimate, because all four cases are to be measured."""
    return LLM(
        args.model,
        dtype=args.dtype,
        num_threads=args.threads,
        num_blocks=2 * (args.tokens // 16 + 8),
        max_num_batched_tokens=max(args.tokens, 2048),
        state_dir=folder,
        state_host_memory="4GiB",
        state_load="always",
        progress=False,
    )


def prompt_of(llm: LLM, tokens: int, number: int) -> list[int]:
    """A text of its own for each repeat, cut to the token."""
    text = f"Report number {number}. " + "The state of a system is what it remembers of its past. " * tokens
    return llm.tokenizer.encode(text)[:tokens]


def one_repeat(llm: LLM, prompt: list[int], folder: Path) -> dict[str, dict[str, Any]]:
    """The four cases on one prompt."""
    rows: dict[str, dict[str, Any]] = {}
    for case in CASES:
        if case != "cold":
            forget(llm, "device", *(["host"] if case.startswith("disk") else []))
        if case == "disk_dropped":
            drop_pages(folder)
        (final,) = llm.generate([prompt], ONE_TOKEN)
        rows[case] = row_of(final)
        settle(llm)
    first = rows["cold"]["token"]
    assert all(row["token"] == first for row in rows.values()), f"other tokens: {rows}"
    return rows


def row_of(final: RequestOutput) -> dict[str, Any]:
    """What is kept of one answer."""
    timeline = final.timeline
    return {
        "ttft_ms": (timeline.ttft_ns or 0) / 1e6,
        "t_state_ms": timeline.state_wait_ns / 1e6,
        "t_prefill_ms": (timeline.t_prefill_ns or 0) / 1e6,
        "hit_tokens_by_tier": final.hit_tokens_by_tier,
        "token": final.token_ids[0],
    }


def settle(llm: LLM) -> None:
    """Idle steps until nothing is on its way to a tier: writing behind is not part of what is timed."""
    while not llm.engine.scheduler.kv.is_settled():
        llm.engine.step()


def forget(llm: LLM, *tiers: str) -> None:
    """The prefix leaves these tiers and stays in those below."""
    for tier in tiers:
        llm.state_store.evict(tier=tier, bytes=EVERYTHING)
    settle(llm)


def report(args: argparse.Namespace, llm: LLM, rows: list[dict[str, dict[str, Any]]]) -> None:
    """A table, then the JSON line: medians, the ratios to cold, and what the engine would have decided itself."""
    medians = {case: statistics.median(row[case]["ttft_ms"] for row in rows) for case in CASES}
    print(f"{'case':14}{'TTFT ms':>10}{'T_state':>10}{'T_prefill':>11}{'cold / case':>13}  hits   (medians, measured)")
    for case in CASES:
        state, prefill = (statistics.median(row[case][key] for row in rows) for key in ("t_state_ms", "t_prefill_ms"))
        hits = rows[-1][case]["hit_tokens_by_tier"]
        ratio = medians["cold"] / medians[case]
        print(f"{case:14}{medians[case]:10.1f}{state:10.1f}{prefill:11.1f}{ratio:13.2f}  {hits}")
    assert llm.engine.parts.device_tier is not None
    loads = [receipt for receipt in llm.state_store.plane.history.recent if receipt.action == "load"]
    document = {
        "benchmark": "state_restore",
        "label": "measured",
        "model": args.model,
        "dtype": str(llm.engine.parts.device_tier.pool.dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "repeats": args.repeats,
        "block_bytes": llm.engine.parts.device_tier.block_bytes,
        "ttft_ms": medians,
        "speedup": {case: medians["cold"] / medians[case] for case in CASES},
        "page_cache": {"disk_warm": "warm", "disk_dropped": "asked to be dropped (posix_fadvise)"},
        "last_estimates": {
            key: loads[-1].detail[key] for key in ("estimated_load_ms", "load_speed", "estimated_compute_ms")
        },
        "rows": rows,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    told(main)
