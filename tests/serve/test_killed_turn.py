"""kill -9 while a turn is kept: its conversation has all of it or nothing, and no response outlives what it belongs to.

Killed before the first text of the turn is written, or between its two: the conversation's next generation and the
response. What is there can be deleted with the conversation: no text is left that nobody has an id of.
"""

from __future__ import annotations

import contextlib
import http.client
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.servers import ServerProcess, running, thread_only

Process = Callable[..., ServerProcess]
SAID = "the night ferry to the outer islands leaves at four"
LONG = (pytest.mark.long, pytest.mark.timeout(600))


def is_in_files(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@thread_only("the named points are of the server's own process")
@pytest.mark.parametrize(("nth_text", "items"), [pytest.param(1, 0, marks=LONG), (2, 2)])
def test_killed_while_a_turn_is_kept(tmp_path: Path, process: Process, nth_text: int, items: int) -> None:
    folder, armed = tmp_path / "state", tmp_path / "armed"
    env = {"KILL_POINT": "texts.write:0", "KILL_HITS": str(nth_text), "KILL_ARMED": str(armed)}
    server = process("--state-dir", str(folder), "--num-blocks", "256", module="tests.serve.kill_child", **env)
    path = f"/v1/conversations/{server.ask('POST', '/v1/conversations', {}).json['id']}"
    turn = {"model": "tiny:random", "input": SAID, "max_output_tokens": 8, "conversation": path.rpartition("/")[2]}
    armed.touch()
    with contextlib.suppress(http.client.HTTPException, ConnectionError):
        raise AssertionError(f"it was not killed: {server.ask('POST', '/v1/responses', turn).status}")
    assert server.wait() == -signal.SIGKILL
    with running(state_dir=str(folder), num_blocks=256) as again:
        assert len(again.get(f"{path}/items").json["data"]) == items
        assert is_in_files(folder, SAID) == bool(items)
        assert again.ask("DELETE", path).status == 200
        assert not is_in_files(folder, SAID), "a response is left whose id nobody was given"
