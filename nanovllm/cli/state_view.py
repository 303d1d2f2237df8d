"""What `nanovllm state` prints for people: tables of objects and tiers, receipts, an object's story.

What it is: lines over the plain data that a place answers with. What it knows nothing about: where it came
from. Invariants: what a name or a content made up is shown harmless; sizes and times have their units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanovllm.cli.terminal import harmless

NUMBERS = ("tokens", "bytes", "score")
FOLDED = ("namespace", "name", "candidate", "why")  # the others are whole, ids to be copied
FIGURES = ("used_bytes", "quota_bytes", "entries", "hits", "misses", "failures", "corrupt", "evicted")


def print_page(found: Mapping[str, Any]) -> None:
    """The objects, and how to see the next ones."""
    rows = [
        (
            obj["state_id"],
            obj["kind"],
            f"{obj['num_tokens']:,}",
            f"{obj['payload_bytes']:,}",
            obj["namespace"],
            _label(obj),
        )
        for obj in found["objects"]
    ]
    _table(("state_id", "kind", "tokens", "bytes", "namespace", "name"), rows)
    if found["next"]:
        _line(f"More: --after {found['next']}")


def print_object(found: Mapping[str, Any]) -> None:
    """Its facts, then what was put."""
    content = found["content"]
    _facts({name: value for name, value in found.items() if name != "content"})
    for name in ("system", "template"):
        if name in content:
            _line(f"{name}: {content[name]!r}")
    if "text" in content:
        _line(f"\n{content['text']}")
    for message in content.get("messages", ()):
        _line(f"\n{message.get('role', '?')}: {message.get('content', '')}")
    if content.get("token_ids"):
        _line(f"\ntoken_ids: {' '.join(map(str, content['token_ids']))}")


def print_document(kept: Mapping[str, Any]) -> None:
    """What was kept, and what became of its KV."""
    label = kept["name"] if kept["version"] is None else f"{kept['name']}@{kept['version']}"
    where = "on the disk" if kept["durable"] else "in memory, and gone with it"
    path = f"a path of {kept['tokens']:,} tokens" if kept["tokens"] else "not tokenized yet"
    _line(f"{label} is kept {where}: {kept['state_id']}, {kept['scope']}, {path}.")
    prefill = kept["prefill"]
    _line(f"KV {prefill['status']}: {prefill['reason']}; {prefill['cached_tokens']:,} tokens of it were found.")


def print_receipt(receipt: Mapping[str, Any]) -> None:
    """What was done, in a line, and the candidates it looked at."""
    _line(_of_receipt(receipt))
    candidates = receipt.get("candidates") or ()
    if candidates:
        rows = [
            (c["key"], c["kind"], f"{c['size_bytes']:,}", _score(c["score"]), c["verdict"], c["reason"])
            for c in candidates
        ]
        _table(("candidate", "kind", "bytes", "score", "verdict", "why"), rows)


def print_story(story: Mapping[str, Any]) -> None:
    """What is known of an object, then its receipts, the oldest first."""
    _facts({"state_id": story["state_id"], **story["facts"]})
    if story["forgotten"]:
        _line(f"\n{story['forgotten']} older receipts are forgotten.")
    if not story["receipts"]:
        _line("\nNo receipts: a server keeps the last of each object; a folder without a server keeps none.")
    for receipt in story["receipts"]:
        _line("")
        print_receipt(receipt)


def print_tiers(found: Mapping[str, Any]) -> None:
    """A column a tier, a row a figure; last the bytes of each kind."""
    tiers: Mapping[str, Any] = found["tiers"]
    figures = {name: [facts[name] for facts in tiers.values()] for name in FIGURES}
    for kind in sorted({kind for facts in tiers.values() for kind in facts["by_kind"]}):
        figures[f"{kind}_bytes"] = [facts["by_kind"].get(kind, 0) for facts in tiers.values()]
    rows = [(name, *("-" if value is None else f"{value:,}" for value in values)) for name, values in figures.items()]
    _table(("", *tiers), rows, numbers=tuple(tiers))
    _line(f"{found['objects']:,} objects, {found['transfers']:,} transfers under way; counted since the start")


def print_file(written: Mapping[str, Any]) -> None:
    """Where the bundle lies."""
    print(written["file"])


def _of_receipt(receipt: Mapping[str, Any]) -> str:
    mark = "ok" if receipt["ok"] else "not done"
    tier = f" in {receipt['tier']}" if receipt.get("tier") else ""
    size = f", {receipt['size_bytes']:,} bytes" if receipt.get("size_bytes") else ""
    state_id = f"  {receipt['state_id']}" if receipt.get("state_id") else ""
    return f"{receipt['action']}{state_id}: {mark}{tier}: {receipt['reason']} ({receipt['ms']:.1f} ms{size})"


def _facts(facts: Mapping[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        is_time = name.endswith("_ms") and name != "ttl_ms" and value is not None
        _line(f"{name.removesuffix('_ms') if is_time else name:{width}}  {_when(value) if is_time else _fact(value)}")


def _fact(value: Any) -> str:
    """A value as words; nothing is a dash."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_fact, value)) or "-"
    return "-" if value is None else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = NUMBERS) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in FOLDED)
    for row in rows:
        table.add_row(*(escape(harmless(cell).replace("\n", " ")) for cell in row))
    Console(highlight=False).print(table)


def _line(text: str) -> None:
    print(harmless(text))


def _label(obj: Mapping[str, Any]) -> str:
    if obj["name"] is None:
        return "-"
    return obj["name"] if obj["version"] is None else f"{obj['name']}@{obj['version']}"


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.4g}"


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
