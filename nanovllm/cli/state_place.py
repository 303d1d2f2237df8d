"""Where `nanovllm state` finds state: a running server, or a folder that nobody has.

What it is: the two ways of making a call, with the same arguments and the same answers as plain data. What it
knows nothing about: flags, tables. Invariants: a folder that a server has is never opened beside it where the
server can be asked; what only looks opens a folder read-only; no verb but `put` and `import` makes a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from nanovllm.errors import InvalidRequestError, RemoteError, StateFolderError
from nanovllm.lab.address import Address
from nanovllm.lab.client import exchange
from nanovllm.state.objects import DEFAULT_NAMESPACE, PUBLIC, Document
from nanovllm.state.report import (
    accepted,
    content_of,
    explanation_facts,
    namespace_of,
    object_facts,
    page,
    position,
    receipt_facts,
    storable,
)
from nanovllm.state.store import DISK_BYTES, StateStore
from nanovllm.state.tiers.ownership import address_of, is_owned, is_state_folder

ANSWER_BYTES = 128 << 20
LOOKING = ("ls", "show", "export", "explain", "top")  # `verify` sets damage aside where it is asked to
MAKING = ("put", "upload", "import")
_OBJECTS, _OBJECT = "/state/objects", "/state/objects/{id}"
_PATHS = {
    "ls": ("GET", _OBJECTS),
    "put": ("POST", _OBJECTS),
    "upload": ("POST", "/state/knowledge"),
    "show": ("GET", _OBJECT),
    "drop": ("DELETE", _OBJECT),
    "explain": ("GET", f"{_OBJECT}/explain"),
    "export": ("GET", f"{_OBJECT}/export"),
    "pin": ("POST", f"{_OBJECT}/pin"),
    "unpin": ("POST", f"{_OBJECT}/unpin"),
    "migrate": ("POST", f"{_OBJECT}/migrate"),
    "fork": ("POST", f"{_OBJECT}/fork"),
    "evict": ("POST", "/state/evict"),
    "verify": ("POST", "/state/verify"),
    "top": ("GET", "/state/tiers"),
    "import": ("POST", "/state/import"),
}


class Place(Protocol):
    """What answers a call: plain data as from JSON, a bundle as bytes."""

    def call(self, verb: str, **arguments: Any) -> Any:
        """Raises what the state plane raises, or RemoteError."""


@contextmanager
def open_place(verb: str, folder: Path | None, url: str | None, api_key: str | None, repair: bool) -> Iterator[Place]:
    """The server at `url`, else the one that has the folder, else the folder itself."""
    if url is None and folder is None:
        raise InvalidRequestError(
            "Where the state is was not said.", param="state_dir", hint="Give --state-dir DIR or --url URL."
        )
    if url is None and folder is not None and is_owned(folder):
        url = address_of(folder)
    if url is not None:
        yield ServerPlace(Address.parse(url, api_key))
        return
    assert folder is not None
    looks = verb in LOOKING or (verb == "verify" and not repair)
    if not looks and verb not in MAKING and not is_state_folder(folder):
        raise StateFolderError(f"{folder} is no state folder.", hint="Name the folder given to --state-dir.")
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    with StateStore.open(folder, disk_bytes=max(DISK_BYTES, 2 * size), read_only=looks) as store:
        yield FolderPlace(store)


class ServerPlace:
    """A server's /state."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def call(self, verb: str, **arguments: Any) -> Any:
        """The arguments go where docs/state.md says: the path, the query, the body."""
        method, path = _PATHS[verb]
        given = {name: value for name, value in arguments.items() if value is not None}
        bundle = given.pop("bundle", None)
        if "{id}" in path:
            path = path.replace("{id}", quote(given.pop("state_id"), safe="@"))
            query = {"namespace": given.pop("namespace")} if "namespace" in given else {}
        else:
            query = given if method == "GET" else given.pop("metadata", {}) if bundle is not None else {}
        if query:
            path = f"{path}?{urlencode(query)}"
        body = given if method == "POST" and bundle is None else bundle
        answer = exchange(self._address, method, path, body, most_bytes=ANSWER_BYTES)
        return answer if verb == "export" else _decoded(answer)


def _decoded(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise RemoteError("The server sent no JSON; it may be no nanovllm server.", code="not_json") from None


def _checked(text: str, system: str | None, template: str | None) -> Document:
    """A document as a server would take it. Raises InvalidRequestError."""
    from nanovllm.engine.knowledge_prompt import check_template  # brings templates, which no other verb needs

    if template is not None:
        check_template(template)
    return Document(text, (), system or "", template or "")


class FolderPlace:
    """A folder's store, opened by this process for one call. No model is known here."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def call(self, verb: str, **arguments: Any) -> Any:
        """By the same words as over HTTP."""
        if verb in ("pin", "unpin"):
            raise InvalidRequestError(
                "A pin is held by a running server, and nobody serves this folder.",
                param="state_dir",
                hint="Start nanovllm serve with --state-dir and ask it.",
            )
        if "state_id" in arguments:
            arguments["namespace"] = namespace_of(arguments["state_id"], arguments.get("namespace"))
        return getattr(self, f"_{verb}")(**arguments)

    def _ls(self, *, limit: int, after: str | None, **filters: Any) -> Any:
        return page(self._store.ls(**filters, after=position(after), limit=limit + 1), limit)

    def _put(self, *, text: str | None, token_ids: Any, messages: Any, metadata: Any) -> Any:
        return accepted(self._store.put(storable(text, token_ids, messages), metadata))

    def _upload(self, *, text: str, scope: str, wait: bool, system: Any, template: Any, **about: Any) -> Any:
        if wait:
            raise InvalidRequestError(
                "No engine has this folder: there is nothing to wait for.",
                param="wait",
                hint="Leave --wait out, or put it on a server (--url) that has the folder.",
            )
        document = _checked(text, system, template)
        namespace = PUBLIC if scope == "public" else DEFAULT_NAMESPACE
        kept = self._store.find(self._store.put(document, {**about, "kind": "knowledge", "namespace": namespace}))
        facts: dict[str, Any] = {"name": kept.name, "version": kept.version, "scope": scope}
        facts |= {"tokens": kept.num_tokens, "durable": kept.durable}
        left = {"status": "left", "reason": "no engine has this folder: the first question computes it"}
        return {"state_id": kept.state_id, **facts, "prefill": {**left, "cached_tokens": 0}, "pin": None}

    def _show(self, **named: Any) -> Any:
        found = self._store.find(**named)
        return {**object_facts(found), "content": content_of(self._store.get(**named))}

    def _drop(self, **named: Any) -> Any:
        return accepted(self._store.drop(**named))

    def _migrate(self, **named: Any) -> Any:
        return accepted(self._store.migrate(**named))

    def _fork(self, *, metadata: dict[str, Any], **named: Any) -> Any:
        namespace = self._store.find(**named).namespace
        return accepted(self._store.fork(**named, metadata={"namespace": namespace, **metadata}))

    def _explain(self, **named: Any) -> Any:
        found = explanation_facts(self._store.explain(**named))
        found["facts"]["same_model"] = None  # as whose?
        return found

    def _export(self, **named: Any) -> bytes:
        return self._store.export(**named)

    def _import(self, *, bundle: bytes, metadata: Any) -> Any:
        return accepted(self._store.import_(bundle, metadata))

    def _evict(self, **what: Any) -> Any:
        return accepted(self._store.evict(**what))

    def _verify(self, **what: Any) -> Any:
        return receipt_facts(self._store.verify(**what))

    def _top(self) -> Any:
        return self._store.top()
