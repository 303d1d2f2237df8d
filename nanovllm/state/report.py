"""What the state plane says, as plain data for JSON: objects, contents, receipts, explanations, pages.

What it is: the one form in which the server and the command line tell of state. What it knows nothing about:
HTTP, terminals, where the state lies. Invariants: bytes are hex; an object's blocks are counted, not listed;
a page is bounded and says where the next one begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nanovllm.errors import InvalidRequestError, StateRefusedError
from nanovllm.state.objects import DEFAULT_NAMESPACE, Document, Session, StateId, StateObject, Storable
from nanovllm.state.receipts import Explanation, Receipt

MAX_PAGE = 100
_ID = re.compile(r"[0-9a-f]{32}")
_CURSOR = re.compile(r"([0-9]{1,16})\.([0-9a-f]{32})")
OMITTED = ("payload_key", "root", "chain", "kv_namespace")


def namespace_of(state_id: str, given: str | None) -> str | None:
    """Where a name or id is looked up: an id everywhere, a name in the namespace given, or in the default one."""
    return given or (None if _ID.fullmatch(state_id) else DEFAULT_NAMESPACE)


def object_facts(obj: StateObject) -> dict[str, Any]:
    """What is known of an object, without its content."""
    facts = {name: getattr(obj, name) for name in obj.__struct_fields__ if name not in OMITTED}
    return {**facts, "num_blocks": len(obj.chain)}


def content_of(obj: Storable) -> dict[str, Any]:
    """What was put, in the words that `storable` takes; a session's facts beside them."""
    if isinstance(obj, Document):
        path = {name: part for name in ("system", "template") if (part := getattr(obj, name))}
        return {"text": obj.text, "token_ids": [*obj.token_ids], **path}
    if isinstance(obj, Session):
        facts = {"facts": {**obj.facts}} if obj.facts else {}
        return {"messages": [*obj.messages], "token_ids": [*obj.token_ids], **facts}
    if isinstance(obj, str):
        return {"text": obj}
    return {"messages" if obj and isinstance(obj[0], Mapping) else "token_ids": [*obj]}


def storable(
    text: str | None, token_ids: Sequence[int] | None, messages: Sequence[Mapping[str, Any]] | None
) -> Storable:
    """What to put: a text or messages, with or without their token ids, or token ids alone.

    Raises InvalidRequestError on nothing, and on text and messages at once.
    """
    if text is not None and messages is not None:
        raise InvalidRequestError("Give text or messages, not both.", param="messages")
    if messages is not None:
        return Session(messages, token_ids or ())
    if text is not None:
        return text if token_ids is None else Document(text, token_ids)
    if not token_ids:
        raise InvalidRequestError("Give text, messages or token_ids.", param="text")
    return token_ids


def receipt_facts(done: Receipt | StateId) -> dict[str, Any]:
    """A receipt; of an id, the one it came with."""
    receipt = done.receipt if isinstance(done, StateId) else done
    plain: dict[str, Any] = msgspec.to_builtins(receipt) if receipt is not None else {"ok": True}
    return {**plain, "state_id": str(done)} if isinstance(done, StateId) else plain


def accepted(done: Receipt | StateId) -> dict[str, Any]:
    """As `receipt_facts`. Raises StateRefusedError, which holds the receipt, where it is a refusal."""
    if isinstance(done, Receipt) and not done.ok:
        raise StateRefusedError(f"Refused: {done.reason}.", receipt=done)
    return receipt_facts(done)


def explanation_facts(explanation: Explanation) -> dict[str, Any]:
    """An object's state and history."""
    plain: dict[str, Any] = msgspec.to_builtins(explanation)
    return plain


def page(objects: Sequence[StateObject], limit: int) -> dict[str, Any]:
    """Up to `limit` of the objects, which should be one more where there are more; `next` is the cursor, or None."""
    shown = objects[:limit]
    last = shown[-1] if len(objects) > limit else None
    cursor = None if last is None else f"{last.created_ms}.{last.state_id}"
    return {"objects": [object_facts(obj) for obj in shown], "next": cursor}


def position(cursor: str | None) -> tuple[int, str] | tuple[()]:
    """Where a page begins. Raises InvalidRequestError on what is no cursor."""
    if cursor is None:
        return ()
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise InvalidRequestError("after is no cursor of this list.", param="after", hint="Give the page's `next`.")
    return int(found[1]), found[2]
