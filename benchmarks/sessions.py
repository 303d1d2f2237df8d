"""A conversation whose server is killed with -9 after every turn: is it the same one, and how soon does it go on?

    python benchmarks/sessions.py             # 20 turns, SmolLM2, float32; the last line is JSON
    python benchmarks/sessions.py --quick     # 6 turns of a shorter conversation

Two servers have the same conversation (greedy, /v1/responses with previous_response_id): one that is never killed and
keeps everything on the device, and `nanovllm serve MODEL --state-dir DIR`, killed with SIGKILL as soon as a turn's last
byte has come, and started again on the same folder. The first message brings a real text of `--first-tokens`, so that
later turns are longer than `--long` tokens.

  equal           turns whose text is that of the server that lives
  disk share      of the tokens that the living server finds on its device, those that the killed one finds on disk
  cold            the very same prompt to the same restarted server under a cache_salt of its own: a full prefill
  warm, dropped   the kernel's pages of the folder are kept before every second start, and dropped before the others

Each started server first answers one short foreign question, so that neither arm pays for what only a process's first
request pays; that one's time is told apart (`first_ms`). TTFT is the client's, T_queue (loading is part of it) the
server's own. Figures are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from command import at_least_one, told
from talk import Conversation, KillableServer, Turn, drop_pages
from texts import real_text
from tqdm import tqdm

FROM_TURN = 5  # from here on the share of what comes from disk is judged
FOLLOW_UPS = (
    "What does that mean for somebody who reads it for the first time? Answer in plain words.",
    "Which part of the text says so? Name the words that matter, and leave out the rest.",
    "Give another example of the same thing, and say where the two differ from each other.",
    "Now put the last answer into one sentence that a colleague would remember tomorrow.",
)


@dataclass
class Row:
    """One turn of the killed server, beside the same turn of the one that lives, and a cold prefill of its prompt."""

    turn: int
    pages: str
    killed: Turn
    alive: Turn
    cold_ms: float | None
    start_s: float
    first_ms: float
    kv_bytes: float

    @property
    def disk_share(self) -> float | None:
        """Of the reusable tokens, those that came from disk."""
        return self.killed.hits.get("disk", 0) / self.alive.cached_tokens if self.alive.cached_tokens else None

    @property
    def is_equal(self) -> bool:
        """Whether both servers said the same."""
        return self.killed.text == self.alive.text

    def facts(self) -> dict[str, Any]:
        """For the JSON line."""
        killed = {key: value for key, value in asdict(self.killed).items() if key not in ("text", "response_id")}
        return {
            "turn": self.turn, "pages": self.pages, **killed, "kv_bytes": self.kv_bytes, "disk_share": self.disk_share,
            "cold_ms": self.cold_ms, "alive_ttft_ms": self.alive.ttft_ms, "alive_cached": self.alive.cached_tokens,
            "equal": self.is_equal, "start_s": self.start_s, "first_ms": self.first_ms,
        }  # fmt: skip


def main() -> None:
    """Measure and report."""
    args = arguments()
    said = messages(args)
    with (
        tqdm(total=2 * args.turns, unit="turn", desc="turns") as bar,
        tempfile.TemporaryDirectory(dir=args.folder) as d,
    ):
        alive = alive_turns(args, said, bar)
        rows = killed_turns(args, said, alive, Path(d), bar)
    report(args, rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--api", choices=("responses", "chat"), default="responses", help="chat sends the history again"
    )
    parser.add_argument("--turns", type=at_least_one, default=20)
    parser.add_argument(
        "--first-tokens", type=at_least_one, default=1300, help="about so many tokens of text in the first message"
    )
    parser.add_argument("--answer-tokens", type=at_least_one, default=32)
    parser.add_argument("--long", type=at_least_one, default=2048, help="prompts of so many tokens are also asked cold")
    parser.add_argument("--dtype", default="float32", help="float32: texts must be equal")
    parser.add_argument("--threads", type=at_least_one, default=None)
    parser.add_argument("--folder", default=None, help="where the state folder is made; default: the temporary one")
    parser.add_argument("--quick", action="store_true", help="6 turns, 250 tokens at first, cold from 300 tokens on")
    args = parser.parse_args()
    if args.quick:
        args.turns, args.first_tokens, args.answer_tokens, args.long = 6, 250, 16, 300
    return args


def messages(args: argparse.Namespace) -> list[str]:
    """What the user says, turn by turn; four characters are about a token."""
    text = real_text(4 * args.first_tokens)
    follow_ups = [FOLLOW_UPS[i % len(FOLLOW_UPS)] for i in range(args.turns - 1)]
    return [
        f"Read this text.\n\n{text}\n\nWhat is it about?",
        *(f"({i + 2}) {ask}" for i, ask in enumerate(follow_ups)),
    ]


def flags(args: argparse.Namespace, *more: str) -> list[str]:
    """The settings of both servers."""
    threads = [] if args.threads is None else ["--num-threads", str(args.threads)]
    patience = ["--queue-timeout", "300"]  # a long prefill on a busy machine is no overload
    return [args.model, "--dtype", args.dtype, "--kv-memory", "1GiB", *patience, *threads, *more]


def conversation(args: argparse.Namespace) -> Conversation:
    """One that has not begun; greedy."""
    return Conversation(args.api, {"temperature": 0, "max_tokens": args.answer_tokens})


def alive_turns(args: argparse.Namespace, said: list[str], bar: tqdm[Any]) -> list[Turn]:
    """The whole conversation on one server."""
    server, talk, turns = KillableServer(*flags(args)), conversation(args), []
    try:
        warm_up(server)
        for text in said:
            turns.append(talk.say(server, text))
            bar.update()
    finally:
        server.kill()
    return turns


def killed_turns(
    args: argparse.Namespace, said: list[str], alive: list[Turn], folder: Path, bar: tqdm[Any]
) -> list[Row]:
    """The same, each turn on a server of its own over the same folder."""
    talk, rows = conversation(args), []
    for number, text in enumerate(said, start=1):
        pages = "dropped" if number % 2 == 0 else "warm"
        if pages == "dropped":
            drop_pages(folder)
        server = KillableServer(*flags(args, "--state-dir", str(folder)))
        try:
            rows.append(one_turn(args, server, talk, text, alive[number - 1], pages))
        finally:
            server.kill()
        bar.update()
    return rows


def one_turn(
    args: argparse.Namespace, server: KillableServer, talk: Conversation, text: str, alive: Turn, pages: str
) -> Row:
    """Warm up, take the turn, and where the prompt is long ask it cold as well."""
    number = len(talk.messages) // 2 + 1
    first_ms = warm_up(server)
    killed = talk.say(server, text)
    is_long = number > 1 and killed.prompt_tokens >= args.long  # the first turn is cold by itself
    cold_ms = cold_ttft_ms(server, talk, number) if is_long else None
    kv_bytes = killed.prompt_tokens // 16 * server.block_bytes()
    return Row(number, pages, killed, alive, cold_ms, server.start_s, first_ms, kv_bytes)


def cold_ttft_ms(server: KillableServer, talk: Conversation, number: int) -> float:
    """A whole prefill of the last turn's prompt, on the same server; a prefill that found anything is none."""
    cold = talk.ask_cold(server, f"cold {number}")
    if cold.cached_tokens:
        raise SystemExit(f"turn {number}: the cold prefill found {cold.cached_tokens} tokens")
    return cold.ttft_ms


def warm_up(server: KillableServer) -> float:
    """One short question that has nothing to do with the conversation; its milliseconds."""
    options = {"temperature": 0, "max_tokens": 2, "cache_salt": "warm-up"}
    return (
        Conversation("chat", options).say(server, "Say hello to a small test, please, and then say no more.").total_ms
    )


TIMES = ("T_queue ms", "TTFT ms", "unkilled TTFT ms", "cold TTFT ms", "start s")
COLUMNS = ("turn", "prompt tokens", "KV MiB", "pages", "cached", "from disk", *TIMES, "equal")


def report(args: argparse.Namespace, rows: list[Row]) -> None:
    """A Markdown table, for dev/LOG.md, too; then the JSON line."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        share = "" if row.disk_share is None else f"{row.disk_share:.0%}"
        cold = "" if row.cold_ms is None else f"{row.cold_ms:.0f}"
        print(f"| {row.turn} | {row.killed.prompt_tokens:,} | {row.kv_bytes / 2**20:.1f} | {row.pages} |"
              f" {row.killed.cached_tokens:,} | {share} | {row.killed.t_queue_ms:.1f} | {row.killed.ttft_ms:.1f} |"
              f" {row.alive.ttft_ms:.1f} | {cold} | {row.start_s:.1f} |"
              f" {'yes' if row.is_equal else 'no'} |")  # fmt: skip
    print(json.dumps(document(args, rows)))


def document(args: argparse.Namespace, rows: list[Row]) -> dict[str, Any]:
    """The figures that bars read stand first."""
    shares = [row.disk_share for row in rows if row.turn >= FROM_TURN and row.disk_share is not None]
    return {
        "benchmark": "sessions",
        "label": "measured",
        "turns_equal": sum(row.is_equal for row in rows),
        "disk_share_min": min(shares, default=None),
        "cold_over_warm": speedup(rows, "warm"),
        "cold_over_dropped": speedup(rows, "dropped"),
        "start_s": statistics.median(row.start_s for row in rows),
        "page_cache": {"warm": "kept", "dropped": "asked to be dropped (posix_fadvise)"},
        **{key: getattr(args, key) for key in ("model", "api", "dtype", "turns", "long", "answer_tokens")},
        "rows": [row.facts() for row in rows],
    }


def speedup(rows: list[Row], pages: str) -> float | None:
    """The median over long turns of cold TTFT over restored TTFT, with these pages."""
    ratios = [row.cold_ms / row.killed.ttft_ms for row in rows if row.cold_ms is not None and row.pages == pages]
    return statistics.median(ratios) if ratios else None


if __name__ == "__main__":
    told(main)
