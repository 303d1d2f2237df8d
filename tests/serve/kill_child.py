"""`nanovllm serve`, killed with SIGKILL when a removal from its folder reaches a named point for the n-th time.

Run as `python -m tests.serve.kill_child serve ...` with KILL_POINT, KILL_HITS, and KILL_ARMED: a file; before it is
there no point counts, so that whatever is kept before it is kept whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nanovllm.cli.main import main
from nanovllm.state.tiers.disk import DiskTier
from nanovllm.state.tiers.ledger import Ledger
from tests.state.folders import killing


def arm() -> None:
    """Every folder that is opened from here on kills, and so does the ledger's commit."""
    armed = Path(os.environ["KILL_ARMED"])
    folder = killing(os.environ["KILL_POINT"], int(os.environ["KILL_HITS"]), armed.exists)
    open_tier, commit = DiskTier.__init__, Ledger.commit

    def opened(self: DiskTier, path: Path, size_bytes: int, **named: Any) -> None:
        open_tier(self, path, size_bytes, **{**named, "folder_class": folder})

    def committed(self: Ledger, *args: Any, **named: Any) -> None:
        folder.reach("ledger.commit:0")
        commit(self, *args, **named)
        folder.reach("ledger.commit:1")

    DiskTier.__init__ = opened  # type: ignore[method-assign]
    Ledger.commit = committed  # type: ignore[method-assign]


if __name__ == "__main__":
    arm()
    main()
