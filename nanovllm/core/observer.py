"""RequestObserver: who may look at the token ids of requests while changing nothing.

What it is: the shape of an observer that an engine tells of each sequence. What it
knows nothing about: engines, and what is observed. Events carry no prompt text and
no token ids; an observer sees both, so it is put in by hand and never by default.
Invariant: nothing an observer does reaches the engine: its return value is not read,
and one that raises is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nanovllm.core.digest import Digest


class RequestObserver(Protocol):
    """Told of each sequence twice. `root` is the root of its digest chain: what else its KV depends on."""

    def entered(self, token_ids: Sequence[int], namespace: str, root: Digest) -> None:
        """It was queued with these known tokens."""

    def finished(self, token_ids: Sequence[int], namespace: str, root: Digest) -> None:
        """It finished (aborted and failed ones are not told), and these tokens of it had KV."""
