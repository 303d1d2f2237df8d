"""Documents asked again and again: what reuse brings, with the device's memory alone and with tiers below it.

    python benchmarks/knowledge.py            # 500 documents, 1,000 questions a seed, 3 seeds; the last line is JSON
    python benchmarks/knowledge.py --quick    # a tenth of all that

500 documents of 256 tokens (real text: Python's reference and docstrings, cut to the token) are asked 1,000
questions; which document is asked follows Zipf(1.0) (`--seeds`). The device's pool holds a tenth of the corpus.

  none     nothing is reused: every question prefills its document (every fifth is asked: none depends on another)
  device   what the pool still holds is reused, least recently used goes first
  tiers    the same pool, with host memory (`--host-share` of the corpus) and a folder on disk below it

The three engines of a seed live in one process and answer the same questions in turns of `--turn`, in a rotating
order, so that a machine that becomes slower meets all of them. Nothing is asked before the stream begins: a document's
first question is cold in every arm. One question runs at a time; between two of them the engine writes behind, as a
server's does, and the time that took is told apart. Hits are counted in tokens by the tier they lay in.

Each ratio is taken per seed; the figure is the median over seeds. The ratio of medians to device-only reuse depends
on luck: the pool alone finds the documents of 484 to 545 of 1,000 questions (12 seeds through the block manager,
without a model: simulated), of fewer than half with 5 of these seeds. There its median is a prefill, and the tiers'
is not; above half it is a hit on the device, too, and the medians tell nothing. So `found` stands beside each, and
the means, in which no crossing hides. `first_answers_equal` counts first tokens equal to those without reuse, of the
questions that were asked so (bf16 may differ; float32 must not).
Figures are measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from bisect import bisect
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from command import at_least_one, told
from served import percentile
from texts import real_text
from tqdm import tqdm

from nanovllm import LLM, SamplingParams

ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
ARMS = ("none", "device", "tiers")
QUESTIONS = (
    "What is the main rule that this text states?",
    "Which exception to the rule does the text name?",
    "Give one example from the text, and say why it matters.",
    "Whom is this text for, and what must they know first?",
)
HEAD = "<|im_start|>system\nYou answer questions about a document.<|im_end|>\n<|im_start|>user\n"
TAIL = "\n\n{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Arm:
    """One engine, and what it was seen to do."""

    name: str
    llm: LLM
    known_from: int = 0  # so many tokens found: the document was among them
    ttft_ms: list[float] = field(default_factory=list)
    t_state_ms: list[float] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)  # the first of each answer, by the question's number
    hits: Counter[str] = field(default_factory=Counter)
    sources: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    behind_s: float = 0.0

    def ask(self, number: int, prompt: list[int]) -> None:
        """Answer one question, then let the engine write behind."""
        (final,) = self.llm.generate([prompt], ONE_TOKEN)
        self.ttft_ms.append((final.timeline.ttft_ns or 0) / 1e6)
        self.t_state_ms.append(final.timeline.state_wait_ns / 1e6)
        self.tokens[number] = final.token_ids[0]
        self.hits.update(final.hit_tokens_by_tier)
        self.prompt_tokens += len(prompt)
        self.sources.append(self.source_of(final.hit_tokens_by_tier))
        start = time.perf_counter()
        while not self.llm.engine.scheduler.kv.is_settled():
            self.llm.engine.step()
        self.behind_s += time.perf_counter() - start

    def source_of(self, by_tier: dict[str, int]) -> str:
        """The slowest tier that the document came from: `computed` where less than half of it was found."""
        if sum(by_tier.values()) < self.known_from:
            return "computed"
        return next(tier for tier in ("remote", "disk", "host", "device") if by_tier.get(tier))


def main() -> None:
    """Measure and report."""
    args = arguments()
    report(args, [one_seed(args, seed) for seed in args.seeds])


def one_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All arms on one stream, from empty."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder))
        arms = [Arm(name, stack.enter_context(engine(args, name, folder))) for name in ARMS]
        prompts = stream(args, seed, arms[0].llm)
        for arm in arms:
            arm.known_from = len(arm.llm.tokenizer.encode(HEAD)) + args.tokens // 2
        warm_up(arms, args)
        ask_all(arms, prompts, args)
        return facts_of(seed, arms, prompts)


def arguments() -> argparse.Namespace:
    """The command line; `--quick` divides documents and questions by ten."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--documents", type=at_least_one, default=500)
    parser.add_argument("--tokens", type=at_least_one, default=256, help="length of a document")
    parser.add_argument("--questions", type=at_least_one, default=1000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity")
    parser.add_argument("--pool-share", type=float, default=0.1, help="the device's pool, of the corpus")
    parser.add_argument("--host-share", type=float, default=0.25, help="host memory, of the corpus; the rest is disk")
    parser.add_argument("--load", choices=("auto", "always"), default="auto", help="auto: only where it is cheaper")
    parser.add_argument("--turn", type=at_least_one, default=25, help="questions to one arm before the next is asked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a stream of questions each")
    parser.add_argument("--none-every", type=at_least_one, default=5, help="ask every n-th question without reuse")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=at_least_one, default=None)
    parser.add_argument("--folder", default=None, help="where the state folder is made; default: the temporary one")
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents and questions")
    args = parser.parse_args()
    if args.quick:
        args.documents, args.questions, args.turn = args.documents // 10, args.questions // 10, 10
    return args


def engine(args: argparse.Namespace, arm: str, folder: str) -> LLM:
    """The arm's engine: all have the same pool, and only `tiers` has anything below it."""
    corpus_blocks = args.documents * args.tokens // 16
    settings: dict[str, Any] = {
        "dtype": args.dtype,
        "num_threads": args.threads,
        "num_blocks": max(2 * (args.tokens // 16 + 8), int(corpus_blocks * args.pool_share)),
        "prefix_mode": "off" if arm == "none" else "reuse",
        "progress": False,
    }
    if arm == "tiers":
        host_bytes = int(corpus_blocks * args.host_share) * block_bytes(args)
        settings |= {"state_dir": folder, "state_host_memory": host_bytes, "state_disk_quota": "16GiB"}
        settings["state_load"] = args.load
    return LLM(args.model, **settings)


def block_bytes(args: argparse.Namespace) -> int:
    """The KV bytes of 16 tokens, from an engine of the same model with hardly any pool."""
    with LLM(args.model, dtype=args.dtype, num_threads=args.threads, num_blocks=16, progress=False) as llm:
        assert llm.engine.parts.device_tier is not None
        return llm.engine.parts.device_tier.block_bytes


def stream(args: argparse.Namespace, seed: int, llm: LLM) -> list[tuple[int, list[int]]]:
    """The questions in order: the document's number, and the prompt."""
    ids, size = llm.tokenizer.encode(real_text()), args.tokens
    if len(ids) < args.documents * size:
        raise SystemExit(f"{args.documents} documents of {size} tokens are wanted; the text has {len(ids):,} tokens.")
    head = llm.tokenizer.encode(HEAD)
    tails = [llm.tokenizer.encode(TAIL.format(question=question)) for question in QUESTIONS]
    rng = random.Random(seed)
    ranked = rng.sample(range(args.documents), args.documents)
    weights = list(itertools.accumulate((rank + 1) ** -args.zipf for rank in range(args.documents)))
    asked = [ranked[bisect(weights, rng.random() * weights[-1])] for _ in range(args.questions)]
    return [(i, [*head, *ids[i * size : (i + 1) * size], *rng.choice(tails)]) for i in asked]


def warm_up(arms: list[Arm], args: argparse.Namespace) -> None:
    """One foreign prompt of each shape, so that no arm pays for the first products of a size; then all is forgotten."""
    for arm in arms:
        for length in (args.tokens + 48, 64, 40, 24):
            arm.llm.generate([[1 + (i * 7919 + length) % 200 for i in range(length)]], ONE_TOKEN)
        while not arm.llm.engine.scheduler.kv.is_settled():
            arm.llm.engine.step()


def ask_all(arms: list[Arm], prompts: list[tuple[int, list[int]]], args: argparse.Namespace) -> None:
    """Every arm answers the questions that are its own, in turns."""
    with tqdm(total=len(prompts) * len(arms), unit="question", desc="questions") as bar:
        for number, start in enumerate(range(0, len(prompts), args.turn)):
            for k in range(len(arms)):
                arm = arms[(number + k) % len(arms)]
                for i in range(start, min(start + args.turn, len(prompts))):
                    if arm.name != "none" or i % args.none_every == 0:
                        arm.ask(i, prompts[i][1])
                    bar.update()


def facts_of(seed: int, arms: list[Arm], prompts: list[tuple[int, list[int]]]) -> dict[str, Any]:
    """One seed's ratios and rows."""
    none, device, tiers = arms
    first = len({document for document, _ in prompts})
    return {
        "seed": seed,
        "none_over_tiers_p50": ratio(none, tiers, statistics.median),
        "device_over_tiers_p50": ratio(device, tiers, statistics.median),
        "none_over_tiers_mean": ratio(none, tiers, statistics.mean),
        "device_over_tiers_mean": ratio(device, tiers, statistics.mean),
        "asked_again_share": 1 - first / len(prompts),  # what an endless cache could find
        "arms": {arm.name: row_of(arm, none) for arm in arms},
    }


def report(args: argparse.Namespace, seeds: list[dict[str, Any]]) -> None:
    """A table of all seeds, then the JSON line."""
    print(
        f"{'seed':>4} {'arm':8}{'TTFT p50':>10}{'mean':>8}{'p90':>8}{'found %':>9}  hit tokens by tier   (ms, measured)"
    )
    for one in seeds:
        for name, row in one["arms"].items():
            ttft = row["ttft_ms"]
            print(f"{one['seed']:4} {name:8}{ttft['p50']:10.1f}{ttft['mean']:8.1f}{ttft['p90']:8.1f}"
                  f"{100 * row['found']:9.1f}  {row['hit_tokens_by_tier']}")  # fmt: skip
    ratios = [key for key in seeds[0] if "_over_" in key]
    document = {
        "benchmark": "knowledge",
        "label": "measured",
        **{key: statistics.median(one[key] for one in seeds) for key in ratios},
        **{key: getattr(args, key) for key in ("model", "documents", "tokens", "questions", "zipf", "seeds")},
        **{key: getattr(args, key) for key in ("pool_share", "host_share", "turn", "load", "none_every")},
        "text": "Python's language reference and docstrings",
        "by_seed": seeds,
    }
    print(json.dumps(document))


def row_of(arm: Arm, none: Arm) -> dict[str, Any]:
    """One arm's figures."""
    by_source = {
        source: {"questions": len(times), "p50_ms": statistics.median(times)}
        for source in ("device", "host", "disk", "computed")
        if (times := [ms for ms, where in zip(arm.ttft_ms, arm.sources, strict=True) if where == source])
    }
    state = arm.llm.engine.parts.state
    return {
        "ttft_ms": {
            "p50": statistics.median(arm.ttft_ms),
            "mean": statistics.mean(arm.ttft_ms),
            "p90": percentile(arm.ttft_ms, 0.9),
        },
        "by_source": by_source,
        "hit_tokens_by_tier": dict(arm.hits),
        "found": 1 - arm.sources.count("computed") / len(arm.sources),  # questions whose document was found
        "hit_share": sum(arm.hits.values()) / arm.prompt_tokens,
        "prompt_tokens": arm.prompt_tokens,
        "first_answers_equal": sum(arm.tokens[i] == token for i, token in none.tokens.items()),
        "write_behind_s": arm.behind_s,
        "facts": {} if state is None else state.facts(),
    }


def ratio(slow: Arm, fast: Arm, centre: Any) -> float:
    """How many times longer the first one's TTFT is."""
    return centre(slow.ttft_ms) / centre(fast.ttft_ms)


if __name__ == "__main__":
    told(main)
