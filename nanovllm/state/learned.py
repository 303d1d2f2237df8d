"""Learned: what a plane learnt about itself, kept in its folder as objects of kind `meta`.

What it is: parts, each a name with a way to write it as plain data and a way to take it in again. What it knows
nothing about: what is in them, but for the envelope: {"schema", "identity", "data"}. Invariants: what is read is
advice: a part that is damaged, of another version, or learnt on another machine or model is left aside with a
warning, and begins anew; writing never waits and never fails anybody: it happens when there is nothing else to do,
when it was put off for long, and at the end; only what changed is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nanovllm.errors import NanoVLLMError
from nanovllm.state.naming import Naming
from nanovllm.state.objects import Metadata
from nanovllm.state.plane import Plane
from nanovllm.state.steps import finish
from nanovllm.state.storing import Pending

META = "meta"
NAMESPACE = "operator"
SCHEMA = 1
EVERY_MS, AT_LAST_MS = 60_000, 600_000  # between two writings when idle; and when there is never a rest


@dataclass(eq=False)
class Part:
    """One thing learnt. `is_bound`: it holds for this machine and model only. `is_small`: written while others work."""

    name: str
    write: Callable[[], Any]
    read: Callable[[Any], None]
    is_bound: bool = True
    is_small: bool = False
    text: str = ""  # as it was written or read the last time
    is_under_way: bool = False


@dataclass
class Learned:
    """The parts of one plane. `identity`: of machine and model; None: nothing is written."""

    plane: Plane
    naming: Naming
    identity: str | None
    parts: list[Part] = field(default_factory=list)
    _written_ms: int = 0

    def __post_init__(self) -> None:
        self._written_ms = self.plane.wall_ms()

    def add(self, part: Part) -> list[str]:
        """Take a part in and read what the folder has of it; warnings for the operator."""
        self.parts.append(part)
        found = self.plane.catalog.named(NAMESPACE, META, part.name, None)
        if found is None or (part.is_bound and self.identity is None):
            return []
        try:
            text = finish(self.plane.mover, self.naming.get(found))
            record = msgspec.json.decode(str(text))
            if record["schema"] != SCHEMA or (part.is_bound and record["identity"] != self.identity):
                return [f"{part.name} was learnt by another version, model or machine: it is learnt anew."]
            part.read(record["data"])
            part.text = str(text)
        except (NanoVLLMError, msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError):
            return [f"{part.name}, which was learnt before, is damaged: it is learnt anew."]
        return []

    def note(self, name: str) -> bool:
        """This part changed: write it now, without waiting. False while it is being written."""
        part = next(part for part in self.parts if part.name == name)
        if part.is_under_way:
            return False
        self._write(part)
        return True

    def rest(self, *, is_idle: bool) -> None:
        """Write what is due."""
        waited = self.plane.wall_ms() - self._written_ms
        if waited >= (EVERY_MS if is_idle else AT_LAST_MS):
            self.write_all(only_small=not is_idle)

    def write_all(self, *, only_small: bool = False) -> None:
        """Begin to write every part that changed."""
        self._written_ms = self.plane.wall_ms()
        for part in self.parts:
            if part.is_small or not only_small:
                self._write(part)

    def _write(self, part: Part) -> None:
        if self.identity is None or part.is_under_way:
            return
        record = {"schema": SCHEMA, "identity": self.identity if part.is_bound else "", "data": part.write()}
        text = msgspec.json.encode(record).decode()
        if text == part.text:
            return
        old = self.plane.catalog.named(NAMESPACE, META, part.name, None)
        part.is_under_way = True
        try:
            if old is None:
                given = Metadata(kind=META, name=part.name, namespace=NAMESPACE)
                self.naming.begin_put(text, given, lambda pending: self._written(part, text, pending))
            else:
                self.naming.begin_update(old, text, None, lambda pending: self._written(part, text, pending))
        except NanoVLLMError:  # no room, or too large: it is tried again with the next
            part.is_under_way = False

    def _written(self, part: Part, text: str, pending: Pending) -> None:
        part.is_under_way = False
        if pending.error is None:
            part.text = text
