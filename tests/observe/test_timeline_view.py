"""The picture under an answer: its terms, its label, and what it shows before the end."""

from __future__ import annotations

import re

from nanovllm.core.timeline import Run, Timeline
from nanovllm.observe.timeline_view import BAR_WIDTH, DecodeStats, render

MS = 10**6


def finished() -> Timeline:
    """Queue 10 (intake 4, state 3), schedule 1, prefill 30 (25 of it running), return 2, gaps 20 and 36, stream 1."""
    return Timeline(
        arrival_ns=5 * MS,
        queued_ns=9 * MS,
        scheduled_ns=15 * MS,
        launch_ns=16 * MS,
        first_handover_ns=48 * MS,
        last_handover_ns=105 * MS,
        token_ns=[46 * MS, 68 * MS, 104 * MS],
        prefill_runs=[Run(16 * MS, 26 * MS, 8), Run(31 * MS, 46 * MS, 8)],
        preempted_ns=[27 * MS],
        state_wait_ns=3 * MS,
        label="simulated",
    )


def figures(text: str) -> dict[str, str]:
    return dict(re.findall(r"^ *([\w ]+?) {2,}([\d.,]+ ms|-)(?: |$)", text, re.MULTILINE))


def test_every_term_in_milliseconds_with_its_label() -> None:
    text = render(finished())
    assert figures(text) == {
        "TTFT": "43.00 ms",
        "T_queue": "10.00 ms",
        "T_intake": "4.00 ms",
        "T_state": "3.00 ms",
        "T_schedule": "1.00 ms",
        "T_prefill": "30.00 ms",
        "running": "25.00 ms",
        "waiting": "5.00 ms",
        "T_return": "2.00 ms",
        "decode": "56.00 ms",
        "T_stream": "1.00 ms",
        "end to end": "100.00 ms",
    }
    assert text.count("simulated") == 12 + 1 and "measured" not in text
    assert "prefill: 2 chunks, preempted 1x" in text
    assert "decode: 2 gaps, median 28.00 ms, P99 36.00 ms, 35.7 tokens/s (simulated)" in text


def test_bars_share_one_scale() -> None:
    rows = {row.split()[0]: row for row in render(finished()).splitlines()}
    column = rows["end"].index("█")
    assert rows["end"].endswith("█" * BAR_WIDTH)
    assert rows["T_queue"].index("█") == column
    assert rows["decode"][column:].index("█") == 43 * BAR_WIDTH // 100  # it starts where TTFT ends
    assert max(map(len, rows.values())) <= 100


def test_a_request_without_an_answer_shows_dashes() -> None:
    text = render(Timeline(arrival_ns=0, queued_ns=2 * MS))
    shown = figures(text)
    assert shown["T_intake"] == "2.00 ms"
    assert [shown[name] for name in ("TTFT", "T_prefill", "decode", "end to end")] == ["-"] * 4
    assert "no gap to measure" in text


def test_p99_is_a_gap_that_occurred() -> None:
    assert DecodeStats.of([]) is None
    assert DecodeStats.of([7]).p99_ns == 7
    assert DecodeStats.of(list(range(1, 101))).p99_ns == 99
    assert DecodeStats.of([0, 0]).tokens_per_s == 0.0
