"""State objects: what can be put, what is known of it, and the checks at the border.

What it is: the words of the state plane as plain data. What it knows nothing about: tiers, bytes on a
disk, policies, the engine.

Invariants: a `state_id` is 128 random bits in hex, never derived from contents or names; a name is data
and never becomes a path; what an object is (`kind`, `namespace`) never changes, what it holds grows a
`generation` with each change.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from nanovllm.core.digest import Digest
from nanovllm.errors import InvalidRequestError, shown
from nanovllm.state.receipts import Receipt

KINDS = ("kv", "knowledge", "session", "meta")
DEFAULT_NAMESPACE = "default"
PUBLIC = "public"  # documents of this namespace can be read by every tenant
MAX_NAME = 128
MAX_TTL_S = 10 * 365 * 86_400
MAX_TOKEN = 2**31 - 1
_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[^\x00-\x1f\x7f@\ud800-\udfff]{1,128}")
_NAMESPACE = re.compile(r"[^\x00-\x1f\x7f@/\\\ud800-\udfff]{1,128}")


class StateId(str):
    """An object's id. `receipt` is what `put`, `fork` and `import_` did, where it comes from one of them."""

    receipt: Receipt | None = None


@dataclass(frozen=True)
class Document:
    """A piece of knowledge: text, and the token ids of its exact path where a model has read it.

    `token_ids` begin at the start of the prompt (system text, documents before it), because KV is exact
    only behind the very tokens it was computed behind. `system` and `template` (with a `{document}` slot)
    are that path as text: what stands before it and around it in a prompt that says nothing else.
    """

    text: str
    token_ids: Sequence[int] = ()
    system: str = ""
    template: str = ""


@dataclass(frozen=True)
class Session:
    """A conversation: its messages, and the token ids that were really computed for them.

    `facts`: what else its keeper must find again beside them, as JSON knows it.
    """

    messages: Sequence[Mapping[str, Any]]
    token_ids: Sequence[int] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


Storable = str | Sequence[int] | Sequence[Mapping[str, Any]] | Document | Session


@dataclass(frozen=True)
class Metadata:
    """What a caller says of an object. `ttl` in seconds; `durable` None leaves it to the kind.

    `kv_namespace`: where its tokens were computed, where several namespaces share their KV.
    """

    kind: str | None = None
    name: str | None = None
    version: str | None = None
    namespace: str = DEFAULT_NAMESPACE
    ttl: float | None = None
    durable: bool | None = None
    kv_namespace: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InvalidRequestError(f"kind must be one of {', '.join(KINDS)}, not {shown(self.kind)}.", param="kind")
        for key in ("name", "version"):
            if getattr(self, key) is not None:
                self._take(key, check_name(getattr(self, key), key))
        if self.version is not None and self.name is None:
            raise InvalidRequestError("A version needs a name.", param="version", hint="Give name, too.")
        self._take("namespace", check_namespace(self.namespace))
        if self.kv_namespace is not None:
            self._take("kv_namespace", check_namespace(self.kv_namespace))
        if self.ttl is not None:
            check_ttl(self.ttl)
        if self.durable not in (None, True, False):
            raise InvalidRequestError(f"durable must be true or false, not {shown(self.durable)}.", param="durable")

    @classmethod
    def of(cls, given: Metadata | Mapping[str, Any] | None) -> Metadata:
        """From what a caller hands in. Raises InvalidRequestError on an unknown key or a bad value."""
        if isinstance(given, Metadata):
            return given
        known = [f.name for f in fields(cls)]
        for key in given or {}:
            if key not in known:
                raise InvalidRequestError(
                    f"metadata has no {shown(key)}.", param="metadata", hint=f"Known: {', '.join(known)}."
                )
        return cls(**(given or {}))

    def _take(self, key: str, value: str) -> None:
        """A plain str, whatever subclass came: an id may be a name, and only a str is written."""
        object.__setattr__(self, key, value)


class StateObject(msgspec.Struct, kw_only=True):
    """What the catalog knows of one object; it is written beside the object's bytes wherever they lie.

    `chain` names the KV blocks of its tokens, in order, under the model whose root is `root`; `kv_namespace`: whose KV
    that is, where it is not its own. `payload_key` names its text. Times are wall-clock milliseconds, because they
    must mean the same after a restart.
    `is_hint`: nobody put it; it has no text, and owns the blocks of requests that named this session.
    """

    state_id: str
    kind: str
    namespace: str
    name: str | None = None
    version: str | None = None
    forked_from: str | None = None
    generation: int = 1
    created_ms: int = 0
    ttl_ms: int | None = None
    expires_ms: int | None = None
    durable: bool = False
    num_tokens: int = 0
    payload_key: bytes = b""
    payload_bytes: int = 0
    root: bytes = b""
    chain: tuple[bytes, ...] = ()
    is_hint: bool = False
    kv_namespace: str | None = None

    @property
    def chain_namespace(self) -> str:
        """Whose KV its tokens name."""
        return self.kv_namespace or kv_namespace(self.namespace)

    @property
    def label(self) -> str:
        """How a person reads it: `name@version`, else the id."""
        if self.name is None:
            return self.state_id
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class KVBlock:
    """One full block as the engine tells of it: what it is, without its bytes.

    `cost_ms`: to compute it again behind its prefix, from the cost table. `layout`: how its bytes lie.
    """

    digest: Digest
    parent: Digest | None
    token_ids: tuple[int, ...]
    namespace: str = DEFAULT_NAMESPACE
    cost_ms: float = 0.0


@dataclass(frozen=True)
class StateMatch:
    """How much of a prompt is known, and where: `tiers[i]` is the fastest tier that holds block i.

    A forecast, not a promise: bytes that turn out wrong when they are read are a miss.
    """

    block_size: int
    digests: tuple[Digest, ...] = ()
    tiers: tuple[str, ...] = ()
    objects: tuple[str, ...] = field(default=())

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix whose KV lies somewhere."""
        return len(self.tiers) * self.block_size

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """The same, tier by tier."""
        return {tier: self.tiers.count(tier) * self.block_size for tier in dict.fromkeys(self.tiers)}


def kv_namespace(namespace: str) -> str:
    """Whose KV an object's tokens name: a public document's is that of prompts which belong to no tenant."""
    return DEFAULT_NAMESPACE if namespace == PUBLIC else namespace


def new_state_id() -> StateId:
    """128 random bits in hex."""
    return StateId(secrets.token_hex(16))


def check_state_id(state_id: object) -> str:
    """Raises InvalidRequestError unless it has the form of an id."""
    if not isinstance(state_id, str) or not _ID.fullmatch(state_id):
        raise InvalidRequestError(f"A state_id is 32 hex digits, not {shown(state_id)}.", param="state_id")
    return str(state_id)


def check_name(name: object, param: str) -> str:
    """1 to 128 characters, no control character, no `@` (it stands between name and version), not `.` or `..`, which
    clients take out of a URL's path."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        raise InvalidRequestError(
            f"{param} must be 1 to {MAX_NAME} printable characters without '@', not {shown(name)}.", param=param
        )
    return str(name)


def check_namespace(namespace: object) -> str:
    """As a name, and without slashes."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise InvalidRequestError(
            f"namespace must be 1 to {MAX_NAME} printable characters without @, / and \\, not {shown(namespace)}.",
            param="namespace",
        )
    return str(namespace)


def check_ttl(ttl: object) -> float:
    """Seconds, more than 0 and at most ten years."""
    is_number = isinstance(ttl, int | float) and not isinstance(ttl, bool)
    if not is_number or not 0 < ttl <= MAX_TTL_S:  # type: ignore[operator]
        raise InvalidRequestError(
            f"ttl must be more than 0 and at most {MAX_TTL_S} seconds, not {shown(ttl)}.", param="ttl"
        )
    return float(ttl)  # type: ignore[arg-type]


def check_tokens(token_ids: Sequence[Any], param: str = "obj") -> tuple[int, ...]:
    """Token ids as integers that fit 31 bits. Raises InvalidRequestError."""
    for token in token_ids:
        if type(token) is not int or not 0 <= token <= MAX_TOKEN:
            raise InvalidRequestError(f"A token id is a number from 0 to {MAX_TOKEN}, not {shown(token)}.", param=param)
    return tuple(token_ids)
