"""The course's table of three kinds of state, with numbers: a prefix, a document, a conversation.

    python benchmarks/state_kinds.py              # SmolLM2, 1,024 tokens of state each; the last line is JSON
    python benchmarks/state_kinds.py --quick      # 256 tokens, one repeat
    python benchmarks/state_kinds.py --write      # also puts the table into docs/state_kinds.md and .zh.md

Each kind is put under a name, then asked about four times: when nothing of its KV is left (a whole prefill), and when
its KV lies on the device, in host memory, on disk (page cache warm). All four give the same token; the question is the
same, so that of a prompt that is found only its last block is computed. `put` is the call
itself: texts are on the disk when it returns, token ids are only named. `load` is the part of TTFT in which the
request waited for its blocks. `worth` is what a MiB of KV on disk saves at its next use. Real text (Python's own);
medians of the repeats, measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from command import at_least_one, told
from served import ROOT
from state_restore import ONE_TOKEN, forget, settle
from texts import real_text
from tqdm import tqdm

from nanovllm import LLM, Document
from nanovllm.engine.outputs import RequestOutput

PAGES = ("docs/state_kinds.md", "docs/state_kinds.zh.md")
BEGIN, END = "<!-- measured: python benchmarks/state_kinds.py --write -->", "<!-- end -->"
CASES: dict[str, tuple[str, ...]] = {  # what is forgotten before the question
    "computed": ("device", "host", "disk"),
    "device": (),
    "host": ("device",),
    "disk": ("device", "host"),
}
QUESTION = "In one sentence: what is this about?"


@dataclass
class Subject:
    """One object of one kind: how it is asked about, and what was measured."""

    kind: str
    text_bytes: int
    put_ms: float
    ask: Callable[[], RequestOutput]
    answers: dict[str, RequestOutput] = field(default_factory=dict)

    def figures(self, block_bytes: int) -> dict[str, float]:
        """One repeat's numbers, in the order of the table."""
        ttft = {case: (final.timeline.ttft_ns or 0) / 1e6 for case, final in self.answers.items()}
        load = {case: final.timeline.state_wait_ns / 1e6 for case, final in self.answers.items()}
        disk = self.answers["disk"]
        mib = disk.cached_tokens // 16 * block_bytes / 2**20
        return {
            "text kept, bytes": self.text_bytes,
            "put, ms": self.put_ms,
            "prompt, tokens": disk.prompt_len,
            "found again, tokens": disk.cached_tokens,
            "KV, bytes per token": block_bytes / 16,
            "KV found again, MiB": mib,
            "TTFT, all computed, ms": ttft["computed"],
            "TTFT, from device, ms": ttft["device"],
            "TTFT, from host, ms": ttft["host"],
            "TTFT, from disk, ms": ttft["disk"],
            "load from host, ms": load["host"],
            "load from disk, ms": load["disk"],
            "computed / from disk": ttft["computed"] / ttft["disk"],
            "worth, ms saved per MiB": (ttft["computed"] - ttft["disk"]) / mib if mib else 0.0,
        }


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, engine(args, folder) as llm:
        llm.generate([list(range(1, 65))], ONE_TOKEN)  # warm up
        repeats = [one_repeat(args, llm, number) for number in tqdm(range(args.repeats), unit="repeat", desc="repeats")]
    figures = {kind: medians([repeat[kind] for repeat in repeats]) for kind in repeats[0]}
    lines = [caption(args), "", *table(figures)]
    print("\n".join(lines))
    if args.write:
        write(lines)
    settings = {key: getattr(args, key) for key in ("model", "dtype", "tokens", "repeats")}
    print(json.dumps({"benchmark": "state_kinds", "label": "measured", **settings, "kinds": figures}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=at_least_one, default=1024, help="of each object, about")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=at_least_one, default=None)
    parser.add_argument("--folder", default=None, help="where the state folder is made; default: the temporary one")
    parser.add_argument("--write", action="store_true", help="put the table into the pages")
    parser.add_argument("--quick", action="store_true", help="256 tokens, one repeat")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.repeats = 256, 1
    return args


def engine(args: argparse.Namespace, folder: str) -> LLM:
    """All tiers; loads are not left to the estimate, because every case is to be measured."""
    return LLM(
        args.model, dtype=args.dtype, num_threads=args.threads, num_blocks=4 * (args.tokens // 16 + 32),
        max_num_batched_tokens=max(2 * args.tokens, 2048), state_dir=folder, state_host_memory="4GiB",
        state_load="always", progress=False,
    )  # fmt: skip


def one_repeat(args: argparse.Namespace, llm: LLM, number: int) -> dict[str, dict[str, float]]:
    """Each kind with a text of its own, in every case."""
    size = args.tokens * 100_000 // len(llm.tokenizer.encode(real_text(100_000)))
    whole = real_text(3 * (number + 1) * size)
    texts = [whole[(3 * number + i) * size :][:size] for i in range(3)]
    assert llm.engine.parts.device_tier is not None
    block_bytes, figures = llm.engine.parts.device_tier.block_bytes, {}
    for make, text in zip((prefix, document, conversation), texts, strict=True):
        subject = make(llm, text, f"{make.__name__} {number}")
        for case, tiers in CASES.items():
            forget(llm, *tiers)
            subject.answers[case] = subject.ask()
            settle(llm)
        check(subject)
        figures[subject.kind] = subject.figures(block_bytes)
    return figures


def check(subject: Subject) -> None:
    """The same token from everywhere, and the blocks lay where they were meant to."""
    tokens = {final.token_ids[0] for final in subject.answers.values()}
    hits = {case: set(final.hit_tokens_by_tier) for case, final in subject.answers.items()}
    if len(tokens) != 1 or hits != {"computed": set(), "device": {"device"}, "host": {"host"}, "disk": {"disk"}}:
        raise SystemExit(f"{subject.kind}: tokens {tokens}, found in {hits}")


def prefix(llm: LLM, text: str, name: str) -> Subject:
    """Token ids that a prompt begins with; only they are named."""
    ids = llm.tokenizer.encode(text)
    put_ms = timed(lambda: llm.state_store.put(ids, {"kind": "kv", "name": name}))
    prompt = [*ids, *llm.tokenizer.encode(QUESTION)]
    return Subject("kv", 0, put_ms, lambda: llm.generate([prompt], ONE_TOKEN)[0])


def document(llm: LLM, text: str, name: str) -> Subject:
    """A document asked about by name; its path is the chat template and this text."""
    ids = llm.tokenizer.encode(text)
    put_ms = timed(lambda: llm.state_store.put(Document(text, ids), {"name": name, "version": "1"}))
    asked = [{"role": "user", "content": QUESTION}]
    return Subject(
        "knowledge", len(text.encode()), put_ms, lambda: llm.chat(asked, ONE_TOKEN, knowledge=[f"{name}@1"])[0]
    )


def conversation(llm: LLM, text: str, name: str) -> Subject:
    """Eight messages, and the turn that follows them."""
    step = len(text) // 8
    said = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text[i * step : (i + 1) * step]} for i in range(8)
    ]
    put_ms = timed(lambda: llm.state_store.put(said, {"kind": "session", "name": name}))
    following = [*said, {"role": "user", "content": QUESTION}]
    return Subject("session", len(text.encode()), put_ms, lambda: llm.chat(following, ONE_TOKEN)[0])


def timed(call: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def caption(args: argparse.Namespace) -> str:
    """What the figures are of; the load says whether the machine was idle."""
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    subjects = f"about {args.tokens:,} tokens of state each, medians of {args.repeats}"
    return f"{args.model}, dtype {args.dtype}, {subjects}, {load}"


def medians(repeats: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(repeat[name] for repeat in repeats) for name in repeats[0]}


def table(figures: dict[str, dict[str, float]]) -> list[str]:
    """Markdown: a row a figure, a column a kind."""
    names = next(iter(figures.values()))
    rows = [f"| {name} | {' | '.join(shown(figures[kind][name]) for kind in figures)} |" for name in names]
    return [f"| measured | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|", *rows]


def shown(value: float) -> str:
    """Whole where it is large, else two digits after the point."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:,.2f}"


def write(lines: list[str]) -> None:
    """Between the marks of each page."""
    for name in PAGES:
        path = Path(ROOT, name)
        old = path.read_text(encoding="utf-8")
        new = re.sub(f"{re.escape(BEGIN)}.*?{END}", lambda _: "\n".join([BEGIN, *lines, END]), old, flags=re.DOTALL)
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    told(main)
