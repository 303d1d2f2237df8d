"""Task 4 on a recording small enough to count by hand. 任务 4：一段可以手算的录制。

    python -m pytest tests                      both / 两个都测
    python -m pytest tests -k state_counter     the one you chose / 只测所选的

It needs no model. Passing it is necessary, not enough: `nanovllm lab check` compares whole runs.
不需要模型。通过是必要的，但不充分：`nanovllm lab check` 比较整个运行。
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

STARTER = Path(__file__).resolve().parents[1] / "starter"
HEADER = {"record": "header", "block_size": 4, "num_blocks": 10, "block_bytes": 1000}


def told(request_id: str, stage: str, prompt_len: int, generated_len: int) -> dict[str, Any]:
    """A request's record. 一条请求记录。"""
    lengths = {"prompt_len": prompt_len, "generated_len": generated_len}
    return {"request_id": request_id, "stage": stage, "ts_ns": 0, **lengths}


def prompt(request_id: str, token_ids: list[int]) -> dict[str, Any]:
    """A prompt as it entered. 进入时的提示。"""
    return {"record": "prompt", "request_id": request_id, "ts_ns": 0, "token_ids": token_ids}


def figures(name: str, kind: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the starter's class reports of `events`. starter 中的类对 `events` 的报告。"""
    spec = importlib.util.spec_from_file_location(name, STARTER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    observer = getattr(module, kind)()
    for event in events:
        observer.on_event(event)
    return observer.report()


def test_state_counter() -> None:
    """a: 8 tokens in 2 blocks, 9 after its first one: 3 blocks. For that b, 1 block, is preempted; c takes 1."""
    found = figures(
        "state_counter",
        "StateCounter",
        [
            HEADER,
            told("a", "entered", 0, 0),
            told("a", "scheduled", 8, 0),
            told("b", "scheduled", 4, 0),
            {"record": "step", "free_blocks": 7},
            told("a", "first_token", 8, 0),
            told("b", "preempted", 4, 0),
            told("c", "scheduled", 2, 0),
            {"record": "step", "free_blocks": 6},
            told("a", "decode_step", 8, 1),
            told("a", "output_complete", 8, 2),
            told("a", "state_released", 8, 2),
            {"record": "step", "free_blocks": 9},
            told("c", "state_released", 2, 0),
            {"record": "end"},
        ],
    )
    assert found["kind"] == "state_counter"
    assert found["live_requests_max"] == 2, "b was preempted before c came / b 在 c 到来之前已被抢占"
    assert found["used_blocks_max"] == 4
    assert found.get("largest_request_blocks", 3) == 3 and found.get("largest_request_bytes", 3000) == 3000


def test_prefix_probe() -> None:
    """Blocks of 4: b repeats a's first block; c repeats both, but its last token is always computed; d's is new."""
    found = figures(
        "prefix_probe",
        "PrefixProbe",
        [
            HEADER,
            prompt("a", [1, 2, 3, 4, 5, 6, 7, 8]),
            prompt("b", [1, 2, 3, 4, 9, 9, 9, 9, 9]),
            prompt("c", [1, 2, 3, 4, 5, 6, 7, 8]),
            prompt("d", [9, 9, 9, 9, 5, 6, 7, 8, 1]),
            {"record": "end"},
        ],
    )
    assert (found["kind"], found["label"]) == ("prefix_probe", "observe-only")
    assert "potential-overlap" in found["statement"] and "not a realised gain" in found["statement"]
    assert found["prompt_tokens"] == 34
    assert found["overlap_tokens"] == 8, "one block of b, one of c / b 一块，c 一块"
    assert found.get("requests_with_overlap", 2) == 2
