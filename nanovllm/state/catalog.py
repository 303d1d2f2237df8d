"""The catalog: which objects exist, how they are called, which bytes belong to whom and where they lie.

What it is: the books of the state plane in memory, rebuilt at the start from what the tiers found. What it
knows nothing about: moving bytes; what is on the device, which the device alone knows. One thread writes it.

Invariants: an object's payload key and the digests of its chain name it as their owner, and nobody else's
do; a bare name stands for the newest version; an entry exists while its bytes lie in a tier or are on
their way to one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.errors import StateNotFoundError
from nanovllm.state.envelope import Label
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.objects import PUBLIC, StateObject
from nanovllm.state.shelves import ShelfKey, Shelves, place_in_list

NameKey = tuple[str, str, str]  # namespace, kind, name


@dataclass(eq=False, slots=True)
class Entry:
    """Stored bytes: one KV block, or one object's payload. A policy reads it as `Cached`.

    `tiers`: where a verified read is possible; `arriving`: where a write is under way. `home`: the tier whose
    copy is the last of a text and never evicted.
    """

    label: Label
    kind: str
    size_bytes: int
    num_tokens: int
    tiers: set[str] = field(default_factory=set)
    arriving: set[str] = field(default_factory=set)
    home: str | None = None
    last_use: int = 0

    @property
    def key(self) -> bytes:
        """Digest of a block, key of a payload."""
        return self.label.key

    @property
    def parent_key(self) -> bytes | None:
        """The block before it in its chain."""
        return self.label.parent or None

    @property
    def namespace(self) -> str:
        """Whose it is."""
        return self.label.namespace

    @property
    def cost_ms(self) -> float:
        """To compute it again; 0 where that is unknown or impossible."""
        return self.label.cost_ms


class Catalog:
    """Objects, names, owners, entries."""

    def __init__(self) -> None:
        self.objects: dict[str, StateObject] = {}
        self.entries: dict[bytes, Entry] = {}
        self.shelves = Shelves()
        self._versions: defaultdict[NameKey, list[str]] = defaultdict(list)  # the newest last
        self._owners: defaultdict[bytes, set[str]] = defaultdict(set)

    def add(self, obj: StateObject) -> StateObject | None:
        """Enter an object; the one whose full name it takes, if any, is returned and has no name any more."""
        self.objects[obj.state_id] = obj
        self.shelves.add(obj)
        self._own(obj)
        return self._take_name(obj)

    def change(self, new: StateObject) -> list[bytes]:
        """The same object in its next generation; the keys that only the one before owned."""
        old = self.objects[new.state_id]
        self.shelves.remove(old)
        self.shelves.add(new)
        alone = self._disown(old)
        self.objects[new.state_id] = new
        self._own(new)
        return [key for key in alone if key not in self._owners]

    def remove(self, obj: StateObject) -> list[bytes]:
        """Strike it out; the keys that only it owned."""
        obj = self.objects.pop(obj.state_id)
        self.shelves.remove(obj)
        self._forget_name(obj)
        return self._disown(obj)

    def find(self, state_id: str, namespace: str | None = None, kind: str | None = None) -> StateObject:
        """By id, else by name as `name` or `name@version`; of one kind, where that is named. Without a namespace: the
        operator, who sees all by id.

        Raises StateNotFoundError, also for what belongs to another tenant.
        """
        for obj in (self.objects.get(state_id), self._by_name(state_id, namespace, kind)):
            is_seen = obj is not None and (namespace is None or KIND_TABLE[obj.kind].visible_to(obj, namespace))
            if obj is not None and is_seen and kind in (None, obj.kind):
                return obj
        raise StateNotFoundError(f"There is no state {state_id!r:.80}.", param="state_id")

    def named(self, namespace: str, kind: str, name: str, version: str | None) -> StateObject | None:
        """The object of that name and version; the newest of that name where `version` is None."""
        called = [self.objects[state_id] for state_id in self._versions.get((namespace, kind, name), ())]
        found = [obj for obj in called if version is None or obj.version == version]
        return found[-1] if found else None

    def listed(
        self, namespace: str | None, kind: str | None, name: str | None, after: tuple[Any, ...]
    ) -> Iterator[StateObject]:
        """What a tenant may see, the operator everything, the oldest first, beginning behind `after`."""
        whose = None if namespace is None else {namespace, PUBLIC}
        if whose is not None and name is not None:
            called = self._called(whose, kind, name)
            found: Iterable[StateObject] = (obj for obj in called if place_in_list(obj) > after)
        else:
            on = lambda key: (whose is None or key.namespace in whose) and kind in (None, key.kind)  # noqa: E731
            found = (self.objects[state_id] for state_id in self.shelves.walk(on, after))
        for obj in found:
            is_seen = namespace is None or KIND_TABLE[obj.kind].visible_to(obj, namespace)
            if is_seen and name in (None, obj.name, obj.label):
                yield obj

    def holds(self, namespace: str, kind: str, is_hint: bool = False) -> tuple[int, int]:
        """How many objects of a kind a tenant has, and the bytes of their texts, messages and token ids."""
        shelf = self.shelves.on(ShelfKey(namespace, kind, is_hint))
        return len(shelf.row), shelf.size_bytes

    def hints_of(self, namespace: str) -> list[StateObject]:
        """The sessions of a tenant that nobody put."""
        own = self.shelves.walk(lambda key: key.namespace == namespace and key.is_hint)
        return [self.objects[state_id] for state_id in own]

    def owners(self, key: bytes) -> set[str]:
        """The objects that these bytes belong to."""
        return self._owners.get(key, set())

    def kind_of(self, key: bytes) -> str:
        """A block counts as what owns it; without an owner it is plain KV."""
        return min((self.objects[state_id].kind for state_id in self.owners(key)), default="kv")

    def keys_of(self, obj: StateObject) -> list[bytes]:
        """Payload and chain."""
        return [obj.payload_key, *obj.chain] if obj.payload_key else list(obj.chain)

    def entries_of(self, obj: StateObject) -> Iterator[Entry]:
        """Those of its bytes that lie in a tier."""
        return (self.entries[key] for key in self.keys_of(obj) if key in self.entries)

    def _by_name(self, text: str, namespace: str | None, kind: str | None) -> StateObject | None:
        name, at, version = text.partition("@")
        for where in (namespace, PUBLIC) if namespace is not None else (PUBLIC,):
            for each in KIND_TABLE if kind is None else (kind,):
                found = self.named(str(where), each, name, version if at else None)
                if found is not None:
                    return found
        return None

    def _called(self, whose: set[str], kind: str | None, name: str) -> list[StateObject]:
        """Objects of that name, `name@version` or, where they have no name, id, in the order of lists."""
        bare_name = name.partition("@")[0]
        kinds = KIND_TABLE if kind is None else (kind,)
        keys = [(each, kind, bare_name) for each in whose for kind in kinds]
        ids = {state_id for key in keys for state_id in self._versions.get(key, ())} | {name} & self.objects.keys()
        found = sorted((self.objects[state_id] for state_id in ids), key=place_in_list)
        return [obj for obj in found if obj.namespace in whose and obj.kind in kinds]

    def _take_name(self, obj: StateObject) -> StateObject | None:
        if obj.name is None:
            return None
        called = self._versions[obj.namespace, obj.kind, obj.name]
        displaced = [state_id for state_id in called if self.objects[state_id].version == obj.version]
        for state_id in displaced:
            called.remove(state_id)
        called.append(obj.state_id)
        return self.objects[displaced[0]] if displaced else None

    def _forget_name(self, obj: StateObject) -> None:
        key = (obj.namespace, obj.kind, obj.name or "")
        if obj.state_id in self._versions.get(key, ()):
            self._versions[key].remove(obj.state_id)
            if not self._versions[key]:
                del self._versions[key]

    def _own(self, obj: StateObject) -> None:
        for key in self.keys_of(obj):
            self._owners[key].add(obj.state_id)

    def _disown(self, obj: StateObject) -> list[bytes]:
        alone = []
        for key in self.keys_of(obj):
            owners = self._owners[key]
            owners.discard(obj.state_id)
            if not owners:
                del self._owners[key]
                alone.append(key)
        return alone
