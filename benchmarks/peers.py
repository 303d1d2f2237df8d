"""This engine beside vLLM, llama.cpp and transformers on this machine's processor. The last line of stdout is JSON.

    python benchmarks/peers.py --build                       # only make the peers' environments; half an hour at first
    python benchmarks/peers.py                               # every row, every peer, three repeats; about an hour
    python benchmarks/peers.py --only one_stream,concurrent_32 --peers vllm
    python benchmarks/peers.py --resume /tmp/peers.json      # goes on where an interrupted run stopped

Every engine gets the same weights (the values of the GGUF file in bf16; llama.cpp the file itself) and the same token
ids, greedy, the end token ignored. An engine runs alone, in a process of its own, and is started anew for each repeat;
the order turns round with each repeat; figures are medians. A peer that cannot be installed or started is reported as
missing, with the reason. docs/benchmarks.md says what each row means, and what is not compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from command import at_least_one, told
from peers.comparison import Record, compare
from peers.engines import OURS, PEERS, Engine, Missing, python_of
from peers.report import document, print_report
from peers.rows import make_rows
from peers.visits import Place, Worker, measure, visit
from peers.weights import exported

import nanovllm
from nanovllm.config import EngineConfig, parse_setting
from nanovllm.core.cache_dir import cache_dir
from nanovllm.errors import NanoVLLMError


def main() -> int:
    """Parse, build, measure, print. Exit code 1 where a peer that was asked for is missing, or a row of one failed."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a worker is ended with us
    engines = [ours(args), *(peer for peer in PEERS if peer.name in args.peers)]
    rows = [row for row in make_rows(args.shrink) if row.name in args.only]
    pythons, missing = build(engines, args.envs)
    if args.build:
        print(json.dumps({"label": "measured", "built": sorted(pythons), "missing": missing}))
        return 1 if missing else 0
    weights, gguf = exported(args.model, args.envs)
    place = Place(args.envs, weights, gguf, args.threads, args.max_model_len)
    record = Record.load(args.resume, settings(args))
    record.missing |= missing

    def open_visit(engine: Engine, is_capped: bool) -> AbstractContextManager[Worker]:
        return visit(engine, pythons[engine.name], place, is_capped)

    ready = [engine for engine in engines if engine.name in pythons]
    compare(rows, ready, args.repeats, record, open_visit, measure, args.resume)
    found = document(rows, record)
    print_report(rows, engines, found)
    for name, reason in record.missing.items():
        print(f"{name} is missing: {reason}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 1 if record.missing or record.failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows, peers = [row.name for row in make_rows()], [peer.name for peer in PEERS]
    parser.add_argument("--only", type=_names(rows), default=rows)
    parser.add_argument("--peers", type=_names(peers), default=peers)
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=at_least_one, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--max-model-len", type=at_least_one, default=8192)
    parser.add_argument("--ours", choices=["file", "export"], default="file", help="this engine reads the GGUF or bf16")
    parser.add_argument(
        "--set", nargs="+", type=_setting, default=[], metavar="NAME=VALUE", help="settings of this engine, all rows"
    )
    parser.add_argument("--envs", type=Path, default=cache_dir() / "peers", help="where environments and weights lie")
    parser.add_argument("--build", action="store_true", help="make the environments and measure nothing")
    parser.add_argument("--shrink", type=at_least_one, default=1, help="divide all sizes: shows that it runs")
    parser.add_argument("--resume", type=Path, help="a file that keeps what is measured; go on from it if it exists")
    parser.add_argument("--json", type=Path, help="also write the JSON document here")
    return parser.parse_args()


def ours(args: argparse.Namespace) -> Engine:
    """This engine in the one configuration that serves every row."""
    own = OURS.settings["engine"] | dict(args.set)
    return dataclasses.replace(OURS, settings={"engine": own}, takes_gguf=args.ours == "file")


def build(engines: list[Engine], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The interpreter of each engine that can be had, and why of each that cannot."""
    pythons, missing = {}, {}
    for engine in engines:
        try:
            pythons[engine.name] = python_of(engine, folder)
        except Missing as error:
            missing[engine.name] = str(error)
    return pythons, missing


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all figures depend on."""
    return {
        "model": args.model,
        "threads": args.threads,
        "max_model_len": args.max_model_len,
        "shrink": args.shrink,
        "ours": {"weights": args.ours, "set": dict(args.set), "source": source()},
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
    }


def source() -> str:
    """A hash of our sources: a run that goes on does not mix two versions."""
    files = sorted(path for path in Path(nanovllm.__file__).parent.rglob("*") if path.suffix in {".py", ".c", ".h"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _setting(text: str) -> tuple[str, Any]:
    name, is_given, value = text.partition("=")
    if not is_given or name not in {field.name for field in dataclasses.fields(EngineConfig)}:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE of an engine's setting")
    try:
        return name, parse_setting(name, value)
    except NanoVLLMError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def parse_names(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse_names


if __name__ == "__main__":
    told(main)
