"""Verbs that read or write bytes of a tier, as steps: for the store, which waits, and for an engine, which does not.

What it is: the way from a name to the module that does it, for those verbs. What it knows nothing about: who waits.
Invariants: an object is found within the caller's namespace, and is the caller's own where the verb changes it or
tells of its history; a bad argument is refused before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError, StateNotFoundError, shown
from nanovllm.state.audit import Audit
from nanovllm.state.bundle import Bundles
from nanovllm.state.migration import Migration
from nanovllm.state.naming import Naming
from nanovllm.state.objects import Metadata, StateId, StateObject, Storable, check_ttl
from nanovllm.state.plane import Plane
from nanovllm.state.receipts import Receipt
from nanovllm.state.residency import Residency
from nanovllm.state.steps import Steps

Given = Metadata | Mapping[str, Any] | None
LATER = ("get", "fork", "drop", "export", "import_", "pin", "migrate", "verify")


@dataclass(frozen=True)
class Verbs:
    """Of one store; each is documented there."""

    plane: Plane
    naming: Naming
    residency: Residency
    migration: Migration
    bundles: Bundles
    audit: Audit

    def get(self, state_id: str, namespace: str | None = None) -> Steps[Storable]:
        """What was put."""
        return self.naming.get(self.find(state_id, namespace))

    def fork(self, state_id: str, metadata: Given = None, namespace: str | None = None) -> Steps[StateId]:
        """A second object that begins as the first."""
        obj = self.find(state_id, namespace)
        given = Metadata.of({"namespace": obj.namespace} if metadata is None else metadata)
        return self.naming.fork(obj, given)

    def drop(self, state_id: str, namespace: str | None = None, reason: str = "asked") -> Steps[Receipt]:
        """Out of every tier, or what is left of an earlier drop."""
        return self.naming.drop(self._to_drop(state_id, namespace), reason)

    def export(self, state_id: str, namespace: str | None = None) -> Steps[bytes]:
        """One bundle."""
        return self.bundles.export(self.find(state_id, namespace))

    def import_(self, bundle: bytes, metadata: Given = None) -> Steps[StateId]:
        """A bundle taken in."""
        if not isinstance(bundle, bytes | bytearray | memoryview):
            raise InvalidRequestError(f"bundle is what export gave, not {shown(bundle)}.", param="bundle")
        return self.bundles.import_(bytes(bundle), Metadata.of(metadata))

    def pin(
        self, state_id: str, device: str = "gpu", ttl: float | None = None, namespace: str | None = None
    ) -> Steps[Receipt]:
        """A claim on residency."""
        obj = self.own(state_id, namespace)
        check_tier(device, "device")
        return self.residency.pin(obj, device, None if ttl is None else check_ttl(ttl))

    def migrate(self, state_id: str, tier: str, namespace: str | None = None) -> Steps[Receipt]:
        """Bytes to a tier."""
        return self.migration.migrate(self.own(state_id, namespace), check_tier(tier, "tier"))

    def verify(self, tier: str | None = None, *, repair: bool = False) -> Steps[Receipt]:
        """Everything read and checked. Raises InvalidRequestError where there is no such tier."""
        if tier is not None and check_tier(tier, "tier") not in self.plane.places:
            there = f"There are {', '.join(self.plane.places)}."
            raise InvalidRequestError(f"There is no tier {tier!r:.60} to verify.", param="tier", hint=there)
        return self.audit.verify(tier, repair)

    def find(self, state_id: str, namespace: str | None = None, kind: str | None = None) -> StateObject:
        """The object of an id or name, if the caller may see it and it has not expired."""
        if not isinstance(state_id, str):
            raise InvalidRequestError(f"state_id is an id or a name, not {shown(state_id)}.", param="state_id")
        obj = self.plane.catalog.find(state_id, namespace, kind)
        if obj.expires_ms is not None and self.plane.wall_ms() >= obj.expires_ms:
            self.naming.drop_soon(obj, "expired")
            raise StateNotFoundError(f"There is no state {state_id!r:.80}.", param="state_id")
        return obj

    def own(self, state_id: str, namespace: str | None = None) -> StateObject:
        """As `find`: a public document is read by all and changed by its owner."""
        obj = self.find(state_id, namespace)
        if namespace not in (None, obj.namespace):
            raise StateNotFoundError(f"There is no state {state_id!r:.80} of yours.", param="state_id")
        return obj

    def leaving(self, state_id: str, namespace: str | None = None, kind: str | None = None) -> list[StateObject]:
        """Dropped objects of that id or name of which a tier still has bytes."""
        return self.plane.debts.leaving(state_id, namespace, kind)

    def _to_drop(self, state_id: str, namespace: str | None) -> StateObject:
        try:
            return self.own(state_id, namespace)
        except StateNotFoundError:
            left = self.leaving(state_id, namespace)
            if not left:
                raise
            return left[0]


def check_tier(name: object, param: str) -> str:
    """A tier's name, which may be none of a tier here. Raises InvalidRequestError where it is no text at all."""
    if not isinstance(name, str):
        raise InvalidRequestError(f"{param} is a tier's name, not {shown(name)}.", param=param)
    return name
