"""Log lines: their exact form, what they leave out, and what they say when they lose something."""

from __future__ import annotations

import io

import pytest

from nanovllm.core.clock import VirtualClock
from nanovllm.core.events import EventBus
from nanovllm.errors import ConfigError
from nanovllm.observe.lifecycle import LifecycleLog


@pytest.fixture
def bus() -> EventBus:
    return EventBus(VirtualClock(start_ns=1_234_567_899), capacity=8)


def one_of_each(bus: EventBus, request_id: str = "req-1") -> None:
    bus.request(request_id, "decode_step", 1, 40, 7, 3)
    bus.step(9, 3, 4, 5, 16, 2, 77)
    bus.block("stored", b"d", b"p", 16)


@pytest.mark.parametrize(
    ("line_format", "lines"),
    [
        ("stage", "req-1 40 decode_step\n"),
        ("state", "3 4\n"),
        ("bench", "[1.234567] req-1 decode_step 40 7 3\n[1.234567] batch_state 3 4 5 16 2 77\n"),
    ],
)
def test_line_formats(bus: EventBus, line_format: str, lines: str) -> None:
    out = io.StringIO()
    log = LifecycleLog(bus, line_format, out)
    one_of_each(bus)
    log.pump()
    log.pump()
    assert out.getvalue() == lines


def test_an_unknown_format_is_refused(bus: EventBus) -> None:
    with pytest.raises(ConfigError, match="log must be one of stage, state, bench"):
        LifecycleLog(bus, "all", io.StringIO())


@pytest.mark.parametrize(("request_id", "shown"), [("a b\nc", "a%20b%0Ac"), ("", "-"), ("日本", "日本")])
def test_an_id_stays_one_field_of_one_line(bus: EventBus, request_id: str, shown: str) -> None:
    out = io.StringIO()
    log = LifecycleLog(bus, "stage", out)
    one_of_each(bus, request_id)
    log.pump()
    assert out.getvalue() == f"{shown} 40 decode_step\n"


def test_a_slow_log_says_what_it_lost(bus: EventBus) -> None:
    out = io.StringIO()
    log = LifecycleLog(bus, "stage", out)
    for _ in range(11):
        bus.request("r", "queued", 0, 1, 0)
    log.pump()
    assert out.getvalue().splitlines()[0] == "# 3 events lost" and out.getvalue().count("queued") == 8
