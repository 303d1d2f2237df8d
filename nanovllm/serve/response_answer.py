"""A response as one JSON object, or as its stream of numbered events.

What it is: two renderings of one `Draft`. What it knows nothing about: how it grows, storage. Invariants: events
are numbered from 0 without a gap; the last one holds the whole object, the one that a GET gives back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nanovllm.engine.messages import Finished
from nanovllm.serve import sse
from nanovllm.serve.merging import Batch
from nanovllm.serve.response_draft import Draft, Event


class ResponseWhole:
    """The response at once."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def add(self, batch: Batch) -> bytes:
        """Collect; nothing is sent before the end."""
        for _, deltas in batch:
            for delta in deltas:
                self.draft.add(delta)
        return b""

    def end(self, finished: list[Finished]) -> bytes:
        """The body."""
        return msgspec.json.encode(self.draft.as_object())


class ResponseStream:
    """The response as events."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._count = 0

    def add(self, batch: Batch) -> bytes:
        """The events of a step."""
        events = [] if self._count else self.draft.begin()
        for _, deltas in batch:
            for delta in deltas:
                events += self.draft.add(delta)
        return self._frames(events)

    def end(self, finished: list[Finished]) -> bytes:
        """The last event."""
        return self._frames([self.draft.end()])

    def failed(self, error: dict[str, Any]) -> bytes:
        """The response failed; and the error itself, which clients raise."""
        told = {**error["error"], **error, "type": "error"}
        return self._frames([*([] if self._count else self.draft.begin()), self.draft.fail(error["error"]), told])

    def _frames(self, events: Sequence[Event]) -> bytes:
        frames = []
        for event in events:
            frames.append(sse.event(event["type"], {**event, "sequence_number": self._count}))
            self._count += 1
        return b"".join(frames)
