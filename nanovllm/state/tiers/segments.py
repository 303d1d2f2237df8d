"""Segments: sealed KV in append-only files, without fsync.

    frame: magic 8 | length u64 | xxh3-64 of both | state u8 | zeros to 32 | sealed bytes | zeros to 512

What it is: frames behind each other in files that are filled, thinned out and then rewritten as a whole.
What it knows nothing about: what is in the bytes, beyond the label; which frames are worth keeping.

Invariants: a frame never moves within its file and its bytes never change, except that a dropped one is
marked dead, or overwritten by zeros where it must not be readable any more (`scrub`). Frames begin at
multiples of 512, so that the frames behind a damaged one are found again. Nothing here is promised after
a crash: what is found is verified by whoever reads it. Appends and drops come from one thread.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_64_digest

from nanovllm.errors import TierError
from nanovllm.state.envelope import BadEnvelope, Header, read_header
from nanovllm.state.tiers.folder import Folder
from nanovllm.state.tiers.tier import Found, Item

ALIGNMENT = 512
FRAME_MAGIC = b"NVFRAME\n"
FRAME_BYTES = 32
STATE_AT = 24
LIVE, DEAD = b"L", b"D"
PROBE = 4096  # read at each frame on recovery; holds the label and sums of most envelopes
THIN = 0.5  # a segment with more than this share of dead bytes is rewritten
_FIXED = struct.Struct("<8sQ")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame lies: `length` is that of its sealed bytes."""

    segment: int
    offset: int
    length: int

    @property
    def footprint(self) -> int:
        """Bytes of the file that the frame takes."""
        return -(-(FRAME_BYTES + self.length) // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class Segment:
    """One file, open. `end` is where the next frame goes."""

    fd: int
    end: int = 0
    live_bytes: int = 0


@dataclass
class SegmentCounts:
    """What collection did; `copied_bytes` is the write amplification."""

    copied_bytes: int = 0
    removed_segments: int = 0


@dataclass
class Segments:
    """All segments of one folder."""

    folder: Folder
    segment_bytes: int
    read_only: bool = False
    counts: SegmentCounts = field(default_factory=SegmentCounts)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._places: dict[bytes, Place] = {}
        self._dead: defaultdict[bytes, list[Place]] = defaultdict(list)
        self._has_removed = True  # files, since names were synced; whoever had the folder before may have, too

    @property
    def live_bytes(self) -> int:
        """What can be found."""
        with self._lock:
            return sum(segment.live_bytes for segment in self._segments.values())

    @property
    def file_bytes(self) -> int:
        """What the files take, dead frames included."""
        with self._lock:
            return sum(segment.end for segment in self._segments.values())

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def append(self, items: Sequence[Item]) -> None:
        """Write frames behind the last one; a key that is here already is left as it is."""
        for item in items:
            if item.key not in self._places:
                self._append(item.key, item.sealed)

    def read(self, key: bytes) -> bytes | None:
        """The sealed bytes, unverified. May run beside the writing thread: it reads through a descriptor of its own."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                return None
            fd = os.dup(self._segments[place.segment].fd)
        try:
            return self.folder.read(fd, place.length, place.offset + FRAME_BYTES)
        finally:
            os.close(fd)

    def drop(self, keys: Sequence[bytes], *, scrub: bool = False) -> None:
        """Mark dead; with `scrub`, overwrite this and every older copy that was not collected yet, for good when it
        returns."""
        for key in keys:
            with self._lock:
                place = self._places.pop(key, None)
            if place is not None:
                self._mark_dead(key, place)
        if scrub:
            self._scrub(keys)

    def collect(self, room_for: int = 0, limit: int | None = None) -> None:
        """Rewrite thin segments; then those with most dead bytes, until `room_for` more stay within `limit`."""
        for number in [n for n, s in self._segments.items() if s.end and s.live_bytes <= s.end * (1 - THIN)]:
            if number != max(self._segments) or not self._segments[number].live_bytes:
                self._rewrite(number)
        while limit is not None and self.file_bytes + room_for > limit:
            number = max(self._segments, key=lambda n: self._segments[n].end - self._segments[n].live_bytes, default=-1)
            if number < 0 or self._segments[number].end == self._segments[number].live_bytes:
                return
            self._rewrite(number)

    def recover(self) -> Iterator[Found]:
        """Find every live frame of the folder by its head; later copies win."""
        labels: dict[bytes, Found] = {}
        for name in self.folder.names():
            stem, _, suffix = name.partition(".")
            if suffix == "seg" and stem.isdigit():
                try:
                    self._recover_segment(int(stem), name, labels)
                except TierError:
                    continue  # one file less; the others are whole
        yield from labels.values()

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for segment in self._segments.values():
                os.close(segment.fd)
            self._segments.clear()
            self._places.clear()
            self._dead.clear()

    def _append(self, key: bytes, sealed: bytes) -> None:
        number = self._segment_for(len(sealed))
        segment = self._segments[number]
        place = Place(number, segment.end, len(sealed))
        frame = frame_head(len(sealed)) + sealed
        try:
            self.folder.write(segment.fd, frame + bytes(place.footprint - len(frame)), place.offset)
        except TierError:
            self.folder.truncate(segment.fd, segment.end)
            raise
        with self._lock:
            segment.end += place.footprint
            segment.live_bytes += place.footprint
            self._places[key] = place

    def _segment_for(self, length: int) -> int:
        """The last segment while it has room, else a new one."""
        last = max(self._segments, default=0)
        if last and self._segments[last].end + length <= self.segment_bytes:
            return last
        number, fd = self._create_after(last)
        with self._lock:
            self._segments[number] = Segment(fd)
        return number

    def _create_after(self, number: int) -> tuple[int, int]:
        """A new file behind all others, those that could not be read included."""
        while True:
            number += 1
            try:
                return number, self.folder.create(segment_name(number))
            except TierError as error:
                if not isinstance(error.__cause__, FileExistsError):
                    raise

    def _mark_dead(self, key: bytes, place: Place) -> None:
        segment = self._segments[place.segment]
        segment.live_bytes -= place.footprint
        self._dead[key].append(place)
        self.folder.write(segment.fd, DEAD, place.offset + STATE_AT)

    def _zero(self, place: Place) -> None:
        segment = self._segments[place.segment]
        self.folder.write(segment.fd, bytes(place.footprint - FRAME_BYTES), place.offset + FRAME_BYTES)

    def _scrub(self, keys: Sequence[bytes]) -> None:
        """Zeros that a power loss does not take back; nor does it bring back a file that was removed with copies."""
        dead = [place for key in keys for place in self._dead.get(key, ())]
        for place in dead:
            self._zero(place)
        for number in {place.segment for place in dead}:
            self.folder.sync(self._segments[number].fd)
        if self._has_removed:
            self.folder.sync_names()
            self._has_removed = False
        for key in keys:  # not before: whoever tries again must find them
            self._dead.pop(key, None)

    def _rewrite(self, number: int) -> None:
        """Copy what lives to the end of the last segment and remove the file."""
        segment = self._segments[number]
        moved = [(key, place) for key, place in self._places.items() if place.segment == number]
        if number == max(self._segments) and moved:
            segment.end = max(segment.end, self.segment_bytes)  # full: copies go to a new one
        for key, place in moved:
            sealed = self.folder.read(segment.fd, place.length, place.offset + FRAME_BYTES)
            self._append(key, sealed)
            segment.live_bytes -= place.footprint
            self.counts.copied_bytes += place.footprint
        self.folder.remove(segment_name(number))
        self._has_removed = True
        with self._lock:
            del self._segments[number]
            os.close(segment.fd)
        for key in [key for key, places in self._dead.items() if any(p.segment == number for p in places)]:
            self._dead[key] = [place for place in self._dead[key] if place.segment != number]
            if not self._dead[key]:
                del self._dead[key]
        self.counts.removed_segments += 1

    def _recover_segment(self, number: int, name: str, labels: dict[bytes, Found]) -> None:
        fd = self.folder.open(name, os.O_RDONLY if self.read_only else os.O_RDWR)
        segment = self._segments[number] = Segment(fd)
        size, offset = self.folder.size(fd), 0
        while offset < size:
            head = self.folder.read(fd, PROBE, offset)
            length = frame_length(head)
            if length is None or offset + FRAME_BYTES + length > size:
                offset += ALIGNMENT
                continue
            place = Place(number, offset, length)
            self._recover_frame(segment, place, head, labels)
            offset += place.footprint
            segment.end = offset
        if not self.read_only and segment.end < size:
            self.folder.truncate(fd, segment.end)

    def _recover_frame(self, segment: Segment, place: Place, head: bytes, labels: dict[bytes, Found]) -> None:
        header = self._header(segment.fd, place, head[FRAME_BYTES:])
        if header is None:
            return
        key = header.label.key
        if head[STATE_AT : STATE_AT + 1] != LIVE:
            self._dead[key].append(place)
            return
        older = self._places.get(key)
        if older is not None:
            self._segments[older.segment].live_bytes -= older.footprint
            self._dead[key].append(older)
        segment.live_bytes += place.footprint
        self._places[key] = place
        labels[key] = Found(header.label, place.length)

    def _header(self, fd: int, place: Place, head: bytes) -> Header | None:
        """The verified envelope head; None where the frame holds none, and it is dead weight."""
        for length in (min(PROBE - FRAME_BYTES, place.length), place.length):
            part = head[:length] if length <= len(head) else self.folder.read(fd, length, place.offset + FRAME_BYTES)
            try:
                return read_header(part)
            except BadEnvelope:
                continue
        return None


def segment_name(number: int) -> str:
    """The file of a segment."""
    return f"{number:012d}.seg"


def frame_head(length: int) -> bytes:
    """The first bytes of a live frame."""
    fixed = _FIXED.pack(FRAME_MAGIC, length)
    return (fixed + xxh3_64_digest(fixed) + LIVE).ljust(FRAME_BYTES, b"\0")


def frame_length(head: bytes) -> int | None:
    """How long the sealed bytes of the frame at `head` are; None where no frame begins."""
    if len(head) < FRAME_BYTES or xxh3_64_digest(head[: _FIXED.size]) != head[_FIXED.size : STATE_AT]:
        return None
    magic, length = _FIXED.unpack_from(head)
    return length if magic == FRAME_MAGIC else None
