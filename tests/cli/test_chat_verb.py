"""`nanovllm chat`: history, commands, and what Ctrl-C ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.terminal import read_until

Run = Callable[..., subprocess.CompletedProcess[str]]
CHAT = ("chat", "tiny:random", "--max-tokens", "4")


def test_each_line_is_a_message(nanovllm: Run, command: Run) -> None:
    done = command(*CHAT, stdin="one\ntwo\n")
    assert done.returncode == 0 and "> " not in done.stdout
    alone = nanovllm("run", "tiny:random", "one", "--max-tokens", "4")
    assert done.stdout.startswith(alone.stdout)


def test_history_is_kept_and_its_kv_is_found_again(nanovllm: Run) -> None:
    done = nanovllm(
        *CHAT, "--block-size", "4", stdin="one\n/timeline\ntwo\n/timeline\n/reset\none\n/timeline\n/exit\nx\n"
    )
    found = re.findall(r"(\d+) prompt tokens.*; (\d+) cached;", done.stderr)
    (first, cold), (second, warm), (third, _) = [(int(prompt), int(cached)) for prompt, cached in found]
    assert cold == 0 and second > first and warm >= first - 4
    assert third == first  # /reset
    assert "conversation is forgotten" in done.stderr


def test_commands(nanovllm: Run) -> None:
    done = nanovllm(*CHAT, stdin="/help\n/timeline\n/what\n\n/exit\nnever said\n")
    assert (done.returncode, done.stdout) == (0, "")
    assert "/reset forgets" in done.stderr and "no answer yet" in done.stderr and "/what is no command" in done.stderr


def test_a_failure_ends_a_piped_conversation(nanovllm: Run) -> None:
    done = nanovllm(*CHAT, "--max-model-len", "64", stdin="short\n" + "long " * 50 + "\nshort\n")
    assert done.returncode == 2 and "tokens; at most" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_ends_the_answer_and_not_the_conversation(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    ours, theirs = os.openpty()
    arguments = ("chat", "tiny:random", "--ignore-eos", "--max-tokens", "1900")
    process = start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read_until(ours, b"> ")
    os.write(ours, b"hello\n")
    read_until(ours, b"hello\r\n")
    read_until(ours, b"", more=32)
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in read_until(ours, b"(stopped)")
    os.write(ours, b"/reset\n")
    read_until(ours, b"forgotten")
    os.write(ours, b"/exit\n")
    assert process.wait(60) == 0
    os.close(ours)
