"""`nanovllm state`: named state listed, put, placed, moved, reclaimed, verified and explained.

What it is: the verbs and their flags. What it knows nothing about: where the state is (`state_place.py`), how
tables look (`state_view.py`). Invariants: with --json stdout is one JSON document; what was not done is a
failure with exit code 1, damage that `verify` found as well.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanovllm.cli.flags import Verb, with_flags
from nanovllm.config import parse_bytes
from nanovllm.errors import InvalidRequestError

EXAMPLES = """Examples:

  nanovllm state put "The library opens at 8." --name library --version 1 --state-dir runs/state

  nanovllm state ls --kind knowledge

  nanovllm state show library@1

  nanovllm state pin library --device host --ttl 60

  nanovllm state export library --out library.bundle

  nanovllm state verify --json

The folder and the key may come from NANOVLLM_STATE_DIR and NANOVLLM_API_KEY. A folder that a server has \
is asked for there.
"""
WHERE, SAID, DOCUMENT = "Where the state is", "What is said of it", "Of a document"

state = typer.Typer(no_args_is_help=True, help="Look at named state and act on it: in a folder, or on a server.")


@dataclass(frozen=True)
class Where:
    """What the flags said of where the state is, and of the answer's form."""

    state_dir: Path | None
    url: str | None
    api_key: str | None
    as_json: bool

    def call(self, verb: str, *, repair: bool = False, **arguments: Any) -> Any:
        """The answer, as plain data; a bundle as bytes."""
        from nanovllm.cli.state_place import open_place

        more = {"repair": repair} if verb == "verify" else {}
        with open_place(verb, self.state_dir, self.url, self.api_key, repair) as place:
            return place.call(verb, **arguments, **more)

    def tell(self, answer: Any, view: str) -> None:
        """Print it: as JSON, or by that function of `state_view`."""
        if self.as_json:
            print(json.dumps(answer, ensure_ascii=False))
            return
        from nanovllm.cli import state_view

        getattr(state_view, view)(answer)

    def act(self, verb: str, **arguments: Any) -> None:
        """An action and its receipt; exit code 1 where that says it was not done."""
        receipt = self.call(verb, **arguments)
        self.tell(receipt, "print_receipt")
        if not receipt["ok"]:
            raise typer.Exit(1)


def _option(name: str, text: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=False, **more)


_FLAGS: dict[str, tuple[Any, Any]] = {
    "state_dir": (
        Annotated[Path | None, _option("--state-dir", "The folder.", WHERE, envvar="NANOVLLM_STATE_DIR")],
        None,
    ),
    "url": (Annotated[str | None, _option("--url", "A server, e.g. http://127.0.0.1:8000.", WHERE)], None),
    "api_key": (
        Annotated[str | None, _option("--api-key", "The server's admin key.", WHERE, envvar="NANOVLLM_API_KEY")],
        None,
    ),
    "as_json": (Annotated[bool, _option("--json", "Print one JSON document.")], False),
}


def _verb(verb: Verb) -> Verb:
    """Register it under its name, with the flags that all verbs have; they reach it as `where`."""
    kind = inspect.Parameter.KEYWORD_ONLY
    flags = [inspect.Parameter(name, kind, default=default, annotation=a) for name, (a, default) in _FLAGS.items()]
    whole = with_flags(verb, "where", flags, lambda values: Where(**{name: values.pop(name) for name in _FLAGS}))
    name = verb.__name__.rstrip("_")
    state.command(name, epilog=EXAMPLES)(whole)
    return verb


StateName = Annotated[str, typer.Argument(metavar="STATE", help="An id, a name or name@version.", show_default=False)]
Namespace = Annotated[str | None, _option("--namespace", "Where a name is looked up (default: default).")]
KindName = Literal["kv", "knowledge", "session", "meta"]
Kind = Annotated[KindName | None, _option("--kind", "One kind alone.")]
Tier = Annotated[str | None, _option("--tier", "One tier alone: host, disk or remote.")]
OwnKind = Annotated[KindName | None, _option("--kind", "What it is; otherwise its form says so.", SAID)]
OwnName = Annotated[str | None, _option("--name", "A name for it.", SAID)]
OwnVersion = Annotated[str | None, _option("--version", "Its version.", SAID)]
OwnNamespace = Annotated[str | None, _option("--namespace", "Whose it is (default: default).", SAID)]
Ttl = Annotated[float | None, _option("--ttl", "Seconds until it ends.", SAID)]


@_verb
def ls(
    *,
    kind: Kind = None,
    name: Annotated[str | None, _option("--name", "A name or name@version alone.")] = None,
    namespace: Annotated[str | None, _option("--namespace", "What this tenant sees alone.")] = None,
    limit: Annotated[int, _option("--limit", "Objects of one page.", min=1, max=100)] = 50,
    after: Annotated[str | None, _option("--after", "Where the last page ended.")] = None,
    where: Where,
) -> None:
    """List the objects, the oldest first."""
    answer = where.call("ls", kind=kind, name=name, namespace=namespace, limit=limit, after=after)
    where.tell(answer, "print_page")


@_verb
def show(state_id: StateName, *, namespace: Namespace = None, where: Where) -> None:
    """Print what is known of an object and what was put, verified."""
    where.tell(where.call("show", state_id=state_id, namespace=namespace), "print_object")


@_verb
def put(
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="A text; - reads it from stdin.")] = None,
    *,
    messages: Annotated[Path | None, _option("--messages", "A JSON file: a list of messages.", metavar="FILE")] = None,
    token_ids: Annotated[Path | None, _option("--token-ids", "A JSON file: a list of ids.", metavar="FILE")] = None,
    kind: OwnKind = None,
    name: OwnName = None,
    version: OwnVersion = None,
    namespace: OwnNamespace = None,
    ttl: Ttl = None,
    durable: Annotated[bool, _option("--durable", "On the disk before it is acknowledged.", SAID)] = False,
    system: Annotated[str | None, _option("--system", "What the system says before the document.", DOCUMENT)] = None,
    template: Annotated[str | None, _option("--template", "What stands around it, with {document}.", DOCUMENT)] = None,
    public: Annotated[bool, _option("--public", "For every key; needs the admin's.", DOCUMENT)] = False,
    wait: Annotated[bool, _option("--wait", "Until its KV is computed.", DOCUMENT)] = False,
    where: Where,
) -> None:
    """Keep a text, messages or token ids under a new id; or a document, which chat --knowledge answers from.

    A document is a text with a name and one of --system, --template, --public, --wait.
    """
    text = sys.stdin.read() if text == "-" else text
    if public or wait or not system is template is None:
        given = {"messages": messages, "token_ids": token_ids, "namespace": namespace, "durable": durable or None}
        _check_document(text, name, kind, given)
        scope = "public" if public else "own"
        about: dict[str, Any] = {
            "version": version,
            "system": system,
            "template": template,
            "ttl": ttl,
            "scope": scope,
            "wait": wait,
        }
        where.tell(where.call("upload", text=text, name=name, **about), "print_document")
        return
    metadata = _given(kind=kind, name=name, version=version, namespace=namespace, ttl=ttl, durable=durable or None)
    lists = {"messages": _list_of(messages, "messages"), "token_ids": _list_of(token_ids, "token_ids")}
    where.act("put", text=text, **lists, metadata=metadata)


@_verb
def pin(
    state_id: StateName,
    *,
    device: Annotated[str, _option("--device", "The tier: gpu, cpu (the device), host, disk.")] = "gpu",
    ttl: Annotated[float | None, _option("--ttl", "Seconds until the pin ends.")] = None,
    namespace: Namespace = None,
    where: Where,
) -> None:
    """Keep an object's bytes in a tier. Needs a server, which keeps pins over its restarts."""
    where.act("pin", state_id=state_id, namespace=namespace, device=device, ttl=ttl)


@_verb
def unpin(
    state_id: StateName,
    *,
    device: Annotated[str | None, _option("--device", "One tier alone.")] = None,
    namespace: Namespace = None,
    where: Where,
) -> None:
    """Give a pin back."""
    where.act("unpin", state_id=state_id, namespace=namespace, device=device)


@_verb
def migrate(
    state_id: StateName,
    tier: Annotated[str, typer.Argument(metavar="TIER", help="host, disk or remote.")],
    *,
    namespace: Namespace = None,
    where: Where,
) -> None:
    """Bring an object's bytes to a tier."""
    where.act("migrate", state_id=state_id, namespace=namespace, tier=tier)


@_verb
def evict(
    *,
    policy: Annotated[str | None, _option("--policy", "How candidates are ranked, e.g. lru.")] = None,
    size: Annotated[str | None, _option("--bytes", "How much, e.g. 64MiB; otherwise one object.")] = None,
    kind: Kind = None,
    tier: Tier = None,
    where: Where,
) -> None:
    """Free room; nothing that is held goes."""
    count = None if size is None else parse_bytes(size, "bytes")
    where.act("evict", policy=policy, bytes=count, kind=kind, tier=tier)


@_verb
def drop(state_id: StateName, *, namespace: Namespace = None, where: Where) -> None:
    """Remove an object from every tier, and the KV that only it owned."""
    where.act("drop", state_id=state_id, namespace=namespace)


@_verb
def fork(
    state_id: StateName,
    *,
    name: OwnName = None,
    version: OwnVersion = None,
    ttl: Ttl = None,
    namespace: Namespace = None,
    where: Where,
) -> None:
    """Make a second object that begins as the first."""
    metadata = _given(name=name, version=version, ttl=ttl)
    where.act("fork", state_id=state_id, namespace=namespace, metadata=metadata)


@_verb
def export(
    state_id: StateName,
    *,
    out: Annotated[Path, _option("--out", "A new file; never overwritten.", metavar="FILE")],
    namespace: Namespace = None,
    where: Where,
) -> None:
    """Write an object and its KV into a file, as one verified bundle."""
    bundle = where.call("export", state_id=state_id, namespace=namespace)
    try:
        with out.open("xb") as file:
            file.write(bundle)
    except OSError as error:
        raise InvalidRequestError(f"{out} cannot be written: {error.strerror}.", param="out") from None
    where.tell({"file": str(out), "bytes": len(bundle)}, "print_file")


@_verb
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle that `state export` wrote.")],
    *,
    name: OwnName = None,
    version: OwnVersion = None,
    namespace: OwnNamespace = None,
    where: Where,
) -> None:
    """Take a bundle in under a new id, whole or not at all."""
    metadata = _given(name=name, version=version, namespace=namespace)
    where.act("import", bundle=_bytes_of(file, "file"), metadata=metadata)


@_verb
def verify(
    *,
    tier: Tier = None,
    repair: Annotated[bool, _option("--repair", "Set aside what is damaged.")] = False,
    where: Where,
) -> None:
    """Read and check everything; exit code 1 where something is damaged."""
    where.act("verify", tier=tier, repair=repair)


@_verb
def explain(state_id: StateName, *, namespace: Namespace = None, where: Where) -> None:
    """Tell how an object came to be where it is: facts, receipts, candidates, scores."""
    where.tell(where.call("explain", state_id=state_id, namespace=namespace), "print_story")


@_verb
def top(*, where: Where) -> None:
    """Bytes, hits and failures of each tier."""
    where.tell(where.call("top"), "print_tiers")


def _check_document(text: str | None, name: str | None, kind: str | None, others: dict[str, Any]) -> None:
    """Raise InvalidRequestError unless the flags say a document."""
    if not text or name is None or kind not in (None, "knowledge"):
        raise InvalidRequestError("A document is a text with a --name.", param="text" if not text else "name")
    for flag, value in others.items():
        if value is not None:
            raise InvalidRequestError(f"--{flag.replace('_', '-')} says nothing of a document.", param=flag)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _bytes_of(file: Path, param: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{file} cannot be read: {error.strerror}.", param=param) from None


def _list_of(file: Path | None, param: str) -> list[Any] | None:
    if file is None:
        return None
    data = _bytes_of(file, param)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise InvalidRequestError(f"{file} holds no JSON list.", param=param)
    return found
