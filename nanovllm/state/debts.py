"""Debts: what tiers were told to remove and have not removed yet, and of which dropped objects it is.

What it is: the books of unfinished removals, in memory. What it knows nothing about: tiers, when one is tried
again. Invariants: a key is owed by a tier until a removal there has succeeded or somebody wants the bytes anew; a
dropped object is told of as long as a tier owes one of its keys. Blocks that a sequence runs on are owed by the
device and make nobody wait.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from nanovllm.state.objects import StateObject

DEVICE = "device"


@dataclass(frozen=True)
class Leaving:
    """A dropped object, and all that had to go with it."""

    obj: StateObject
    keys: list[bytes]


@dataclass
class Debts:
    """Of one plane."""

    by_tier: defaultdict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    _leaving: dict[str, Leaving] = field(default_factory=dict)

    def owe(self, tier: str, keys: Iterable[bytes]) -> None:
        """The tier has still to remove these."""
        self.by_tier[tier].update(keys)

    def settle(self, tier: str, keys: Collection[bytes]) -> None:
        """It has removed them, or they are wanted again."""
        self.by_tier[tier].difference_update(keys)
        if self._leaving:
            owed = [self.by_tier[name] for name in self.by_tier if name != DEVICE]
            kept = {key: each for key, each in self._leaving.items() if any(not s.isdisjoint(each.keys) for s in owed)}
            self._leaving = kept

    def remember(self, obj: StateObject, keys: list[bytes]) -> None:
        """Its removal was refused by a tier: whoever asks for it again is told so until all is gone."""
        self._leaving[obj.state_id] = Leaving(obj, list(dict.fromkeys((*self.keys_of(obj), *keys))))

    def keys_of(self, obj: StateObject) -> list[bytes]:
        """What had to go with a dropped object, or with an older generation of it, and did not go everywhere."""
        leaving = self._leaving.get(obj.state_id)
        return [] if leaving is None else [*leaving.keys]

    def leaving(self, called: str, namespace: str | None, kind: str | None) -> list[StateObject]:
        """Dropped objects of that id, name or `name@version` of which bytes are left; all tenants' for the operator."""
        seen = [
            each.obj
            for each in self._leaving.values()
            if namespace in (None, each.obj.namespace) and kind in (None, each.obj.kind)
        ]
        return [obj for obj in seen if called in (obj.state_id, obj.name, obj.label)]
