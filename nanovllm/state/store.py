"""StateStore: the state plane's face. Each verb names which of the four questions it answers.

    naming      put update get match fork drop export import_
    residency   pin unpin
    migration   migrate spill load lookup
    reclaim     evict
    and         verify explain top ls tick poll close

What it is: one object that finds the object a verb is about, within the caller's namespace, and hands it to
the module of that verb. What it knows nothing about: how any of it works. Invariants: one thread calls
(an engine brings the calls of others to it, between steps); every action leaves a receipt, a refusal
too; a namespace of None is the operator, who sees everything by id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from nanovllm.core.clock import Clock, MonotonicClock
from nanovllm.core.digest import Digest, root_digest
from nanovllm.errors import EngineClosedError, InvalidRequestError, shown
from nanovllm.state.audit import Audit
from nanovllm.state.bundle import Bundles
from nanovllm.state.catalog import Entry
from nanovllm.state.hints import Hints
from nanovllm.state.kinds.meta import PINS
from nanovllm.state.kinds.table import KIND_TABLE
from nanovllm.state.learned import Learned, Part
from nanovllm.state.memory import parts_of
from nanovllm.state.migration import Load, Migration
from nanovllm.state.mover import Transfer
from nanovllm.state.naming import Naming
from nanovllm.state.objects import (
    DEFAULT_NAMESPACE,
    KVBlock,
    Metadata,
    StateId,
    StateMatch,
    StateObject,
    Storable,
    kv_namespace,
)
from nanovllm.state.place import Place
from nanovllm.state.plane import Plane
from nanovllm.state.policies.policy import Policy
from nanovllm.state.policies.registry import PolicyParts, make_policy
from nanovllm.state.policies.victims import Victims
from nanovllm.state.receipts import Explanation, Receipt
from nanovllm.state.reclaim import Reclaim
from nanovllm.state.residency import Residency
from nanovllm.state.restore import restore
from nanovllm.state.settings import StateSettings
from nanovllm.state.steps import Steps, Then, begin, finish
from nanovllm.state.storing import Pending
from nanovllm.state.tiers.device import DeviceTier
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.host import HostTier
from nanovllm.state.tiers.tier import Tier
from nanovllm.state.verbs import LATER, Given, Verbs, check_tier

CostOf = Callable[[int, int], float]
T = TypeVar("T")
HOST_BYTES, DISK_BYTES = 256 << 20, 4 << 30


def free_of_cost(cached: int, new: int) -> float:
    """T(cached, new) where nobody measured it."""
    return 0.0


class StateStore:
    """Named state over tiers, the fastest first. `warnings` says what was found amiss at the start."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        device: DeviceTier | None = None,
        settings: StateSettings | None = None,
        model: str = "",
        root_of: Callable[[str], Digest] | None = None,
        cost_of: CostOf = free_of_cost,
        clock: Clock | None = None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        threads: bool = True,
        identity: str | None = None,
    ) -> None:
        """`identity`: of machine and model; with it, what is learnt and what is pinned is kept over restarts."""
        clock = clock or MonotonicClock()
        settings = settings or StateSettings()
        if device is not None:
            settings = replace(settings, block_size=device.block_size)
        places = {tier.name: _place(tier, clock, cost_of, threads) for tier in tiers}
        root = root_of or (lambda namespace: root_digest({"model": model, "namespace": namespace}))
        roots = lambda namespace: root(kv_namespace(namespace))  # noqa: E731
        parts = PolicyParts(clock, cost_of)
        policy_of = lambda name: make_policy(name, parts)  # noqa: E731
        self.plane = Plane(places, settings, clock, wall_ms, roots, policy_of, device)
        self._reclaim = Reclaim(self.plane, self._demote)
        self._migration = Migration(self.plane, self._reclaim)
        self._naming = Naming(self.plane, self._reclaim)
        self._hints = Hints(self.plane, self._naming)
        self._residency = Residency(self.plane, self._migration, self._naming.blocks_of)
        self._naming.let_go = self._residency.release_all
        self._bundles = Bundles(self.plane, self._naming, self._migration)
        self._audit = Audit(self.plane, self._residency)
        self._all_verbs = Verbs(self.plane, self._naming, self._residency, self._migration, self._bundles, self._audit)
        self._learned = Learned(self.plane, self._naming, identity)
        self._is_closed = False
        found = restore(self.plane)
        self.warnings = [*(w for tier in tiers for w in getattr(tier, "warnings", ())), *found]
        for part in parts_of(self.plane, self._residency):
            self.learn(part)
        self.tick()

    @classmethod
    def open(
        cls,
        folder: str | Path | None = None,
        *,
        host_bytes: int = HOST_BYTES,
        disk_bytes: int = DISK_BYTES,
        remote: Tier | None = None,
        read_only: bool = False,
        **options: Any,
    ) -> StateStore:
        """Memory, and a folder where one is named. Raises StateFolderError where it is in use or none of ours."""
        tiers: list[Tier] = [HostTier(host_bytes)]
        if folder is not None:
            tiers.append(DiskTier(Path(folder), disk_bytes, read_only=read_only))
        return cls([*tiers, remote] if remote is not None else tiers, **options)

    # naming

    def put(self, obj: Storable, metadata: Given = None) -> StateId:
        """Keep text, token ids, messages, a Document or a Session; its id, which never changes.

        Acknowledged as durable means: on the disk. Raises TypeError on anything else, InvalidRequestError,
        StateConflictError (the name is taken), StateRefusedError (no room; it has the receipt).
        """
        return self._wait(self._naming.put(obj, Metadata.of(metadata)))

    def update(
        self,
        state_id: str,
        obj: Storable,
        *,
        generation: int | None = None,
        namespace: str | None = None,
        kv_namespace: str | None = None,
        erase: bool = False,
    ) -> Receipt:
        """Replace what the object holds, atomically. Raises StateConflictError unless it is at `generation`.

        `kv_namespace`: where its tokens were computed, where that is no longer where it was. `erase`: come back when
        nothing is left of what only the last generation had; a tier that keeps some makes the receipt a refusal, and
        another `drop` of the object tries that again, too.
        """
        pending = self.update_later(
            state_id, obj, generation=generation, namespace=namespace, kv_namespace=kv_namespace, erase=erase
        )
        receipt = self._wait(self._naming.storing.steps(pending)).receipt
        assert receipt is not None
        return receipt

    def put_later(
        self, obj: Storable, metadata: Given = None, then: Callable[[Pending], None] = lambda pending: None
    ) -> Pending:
        """Engine: as `put`, without waiting; `then` is called by `poll` once it was kept or refused.

        Durable puts that come while one is under way share the next group commit.
        """
        self._check_open()
        return self._naming.begin_put(obj, Metadata.of(metadata), then)

    def update_later(
        self,
        state_id: str,
        obj: Storable,
        *,
        generation: int | None = None,
        namespace: str | None = None,
        kv_namespace: str | None = None,
        erase: bool = False,
        then: Callable[[Pending], None] = lambda pending: None,
    ) -> Pending:
        """Engine: as `update`, without waiting."""
        self._check_open()
        old = self._verbs.own(state_id, namespace)
        return self._naming.begin_update(old, obj, generation, then, kv_namespace, erase=erase)

    def get(self, state_id: str, namespace: str | None = None) -> Storable:
        """What was put, verified. Takes an id, `name` or `name@version`. Raises StateNotFoundError."""
        return self._wait(self._verbs.get(state_id, namespace))

    def match(self, tokens: Sequence[int], namespace: str = DEFAULT_NAMESPACE) -> StateMatch:
        """How much KV of this prompt lies where. Changes nothing, touches no disk; a forecast until it is read."""
        self._check_open()
        return self._naming.match(tokens, namespace)

    def fork(self, state_id: str, metadata: Given = None, namespace: str | None = None) -> StateId:
        """A second object that begins as the first; it shares its KV and goes its own way.

        It has the first one's `ttl`, from now on, and its `durable`, where the metadata say nothing else. Raises as
        `put`, InvalidRequestError on another kind, StateConflictError where it would take the very name of the first.
        """
        return self._wait(self._verbs.fork(state_id, metadata, namespace))

    def drop(self, state_id: str, namespace: str | None = None, reason: str = "asked") -> Receipt:
        """Out of every tier: the text, and the KV that only this object owned.

        Nothing can be found from the call on; the receipt comes when the bytes are gone. What a tier fails to
        remove makes it a refusal, and is tried again by `tick` and by another drop of that id; see `leaving`.
        """
        return self._wait(self._verbs.drop(state_id, namespace, reason))

    def export(self, state_id: str, namespace: str | None = None) -> bytes:
        """The object and its KV as one verified bundle."""
        return self._wait(self._verbs.export(state_id, namespace))

    def import_(self, bundle: bytes, metadata: Given = None) -> StateId:
        """Take a bundle in under a new id. Raises StateBundleError; then nothing changed."""
        return self._wait(self._verbs.import_(bundle, metadata))

    def later(self, verb: str, then: Then[Any], **arguments: Any) -> None:
        """Engine: as the verb of that name (`verbs.LATER`), without waiting: `poll` takes it from transfer to transfer.

        `then` is told its result, or what it raised. Raises what is wrong with the arguments.
        """
        assert verb in LATER, verb
        begin(getattr(self._verbs, verb)(**arguments), then)

    # residency

    def pin(
        self, state_id: str, device: str = "gpu", ttl: float | None = None, namespace: str | None = None
    ) -> Receipt:
        """Keep its bytes in a tier for `ttl` seconds; `gpu`, `cuda`, `cpu` and `device` are the device tier.

        Refused where all pins together would take more than their share, where there is no such tier
        here, or where its bytes are nowhere. On the device, blocks computed later are held from then on.
        """
        return self._wait(self._verbs.pin(state_id, device, ttl, namespace))

    def unpin(self, state_id: str, device: str | None = None, namespace: str | None = None) -> Receipt:
        """Give the claim back, in one tier or in all. Not ok where it was not pinned."""
        obj = self._verbs.own(state_id, namespace)
        return self._residency.unpin(obj, None if device is None else check_tier(device, "device"))

    # migration

    def migrate(self, state_id: str, tier: str, namespace: str | None = None) -> Receipt:
        """Bring its bytes to `tier` and give up copies above it. A text's last durable copy stays where it is."""
        return self._wait(self._verbs.migrate(state_id, tier, namespace))

    def spill(self, blocks: Sequence[tuple[KVBlock, bytes]], tier: str | None = None) -> Transfer | None:
        """Engine: begin to write computed blocks; None where nothing was begun."""
        self._check_open()
        return self._migration.spill(blocks, tier)

    def load(self, blocks: Sequence[KVBlock], then: Callable[[Load], None] = lambda load: None) -> Load:
        """Engine: begin to read blocks; told when every tier has answered or is over its deadline."""
        self._check_open()
        return self._migration.load(blocks, then)

    def lookup(self, blocks: Sequence[KVBlock]) -> list[Transfer]:
        """Engine: ask shared tiers for blocks that nobody here has."""
        self._check_open()
        return self._migration.lookup(blocks)

    # reclaim

    def evict(
        self,
        policy: str | None = None,
        bytes: int | None = None,
        kind: str | None = None,
        tier: str | None = None,
    ) -> Receipt:
        """Free `bytes` of a tier, or one object's; `tier` is the fastest that has a candidate where none is named.

        A `policy` that is not the one in force ranks by each object's last use. Nothing that is held goes.
        """
        self._check_open()
        return self._reclaim.evict(policy, bytes, kind, None if tier is None else check_tier(tier, "tier"))

    # looking

    def verify(self, tier: str | None = None, *, repair: bool = False) -> Receipt:
        """Read and check everything, of one tier or of all. Not ok where something is damaged; with `repair` that is
        set aside. Raises InvalidRequestError where there is no such tier."""
        return self._wait(self._verbs.verify(tier, repair=repair))

    def explain(self, state_id: str, namespace: str | None = None) -> Explanation:
        """What is known of an object and every decision that concerned it."""
        return self._audit.explain(self._verbs.own(state_id, namespace))

    def ls(
        self,
        namespace: str | None = None,
        kind: str | None = None,
        *,
        name: str | None = None,
        after: Sequence[Any] = (),
        limit: int | None = None,
    ) -> list[StateObject]:
        """The objects that a tenant may see, the oldest first; all of them for the operator.

        A page has `limit` of them, beginning behind `after`: the (created_ms, state_id) of the last one seen.
        """
        self._check_open()
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidRequestError(f"limit must be a number from 0 up, not {shown(limit)}.", param="limit")
        return list(islice(self.plane.catalog.listed(namespace, kind, name, tuple(after)), limit))

    def holdings(self, namespace: str, kind: str) -> dict[str, int]:
        """How many objects of a kind a tenant has and the bytes of what they hold; and what more would be taken now."""
        self._check_open()
        objects, size = self.plane.catalog.holds(namespace, kind)
        objects_left, bytes_left = self._naming.storing.room(namespace, kind)
        return {"objects": objects, "bytes": size, "objects_left": objects_left, "bytes_left": bytes_left}

    def top(self) -> dict[str, Any]:
        """Counters and bytes of each tier."""
        self._check_open()
        tiers = {name: place.facts() for name, place in self.plane.places.items()}
        return {"objects": len(self.plane.catalog.objects), "transfers": self.plane.mover.num_pending, "tiers": tiers}

    def find(self, state_id: str, namespace: str | None = None, kind: str | None = None) -> StateObject:
        """The object of an id or name, if the caller may see it and it has not expired."""
        return self._verbs.find(state_id, namespace, kind)

    def leaving(self, state_id: str, namespace: str | None = None, kind: str | None = None) -> list[StateObject]:
        """Dropped objects of that id or name of which a tier still has bytes; empty once all of them are gone."""
        return self._verbs.leaving(state_id, namespace, kind)

    # time

    def touch(self, digests: Iterable[bytes], cached: int, new: int, *, hit: bool) -> None:
        """Engine: a request used these blocks; it found `cached` tokens and computed `new`."""
        for digest in digests:
            entry = self.plane.catalog.entries.get(digest)
            if entry is not None:
                self.plane.touch(entry, cached, new, hit=hit)

    def note_session(self, session: str, namespace: str, chain: Sequence[bytes]) -> None:
        """Engine: a request that named this session has these blocks; see `hints`."""
        self._hints.note(session, namespace, tuple(chain))

    def note_stored(self, digests: Iterable[bytes]) -> None:
        """Engine: these blocks are on the device now; pins that waited for them hold them."""
        self._residency.note_stored(digests)

    def poll(self) -> None:
        """End transfers that are over; between steps."""
        self.plane.mover.poll()

    def tick(self) -> None:
        """`poll`, and what time brings: pins and objects that expire, removals that are owed."""
        self.poll()
        self._residency.expire()
        self.plane.pay_debts()
        for state_id in self.plane.catalog.shelves.expired(self.plane.wall_ms()):
            self._naming.drop_soon(self.plane.catalog.objects[state_id], "expired")
        if self._residency.is_changed:
            self._residency.is_changed = not self._learned.note(PINS)
        self._learned.rest(is_idle=False)

    def rest(self) -> None:
        """Engine: there is nothing to do; what was learnt may be written down."""
        self._learned.rest(is_idle=True)

    def learn(self, part: Part) -> None:
        """Engine: keep this over restarts, too; it is read at once, and `warnings` says where it could not be."""
        self.warnings += self._learned.add(part)

    def settle(self) -> None:
        """Wait until nothing is under way; the tiers' deadlines bound that."""
        self.plane.mover.settle()

    def close(self) -> None:
        """Finish what is under way, close the tiers, let the next owner in. A second call does nothing."""
        if self._is_closed:
            return
        self.settle()
        self._learned.write_all()
        self.settle()
        self._is_closed = True
        for place in self.plane.places.values():
            place.close()
        self.poll()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _verbs(self) -> Verbs:
        """Raises EngineClosedError."""
        self._check_open()
        return self._all_verbs

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosedError("This state store was closed.", hint="Open it, or its engine, again.")

    def _wait(self, steps: Steps[T]) -> T:
        self._check_open()
        return finish(self.plane.mover, steps)

    def _demote(self, place: Place, entry: Entry) -> str | None:
        return self._migration.demote(place, entry)


def _place(tier: Tier, clock: Clock, cost_of: CostOf, threads: bool) -> Place:
    """A tier with a policy of its own for each kind."""
    parts = PolicyParts(clock, cost_of)
    policies: dict[str, Policy] = {
        kind.name: make_policy(kind.policy_in(tier.name), parts) for kind in KIND_TABLE.values()
    }
    return Place(tier, Victims(policies), clock, threads=threads)
