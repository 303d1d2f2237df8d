"""Task 4, first choice: a state counter. 任务 4 之一：状态统计器。

    nanovllm lab run 4 --out runs/try --simulated --quick --observer starter/state_counter.py:StateCounter

`on_event` sees every line of a run's recording as a dict, in order. `on_event` 依次看到录制的每一行。
    {"record": "header", "block_size": 16, "num_blocks": 60, "block_bytes": 368640, ...}   the first / 第一条
    {"request_id": "s0-t0", "stage": "scheduled", "prompt_len": 48, "generated_len": 0, "ts_ns": 0, ...}
    {"record": "step" | "wait" | "prompt" | "end", ...}                                    the others / 其余
Stages / 阶段: entered queued scheduled prefill_begin prefill_chunk prefill_end first_token first_handover decode_step
    output_complete preempted aborted failed state_released
"""

from __future__ import annotations

from typing import Any


class StateCounter:
    """Who holds state, and how much. 谁占有状态，占多少。"""

    def __init__(self) -> None:
        self.block_size = self.block_bytes = 0
        self.tokens: dict[str, int] = {}  # request_id -> tokens it holds state for / 它占有状态的 token 数
        self.max_live_requests = self.max_blocks = 0

    def on_event(self, event: dict[str, Any]) -> None:
        """Take in one record. 读入一条记录。"""
        # BEGIN SOLUTION exp4_t4_on_event
        # PROMPT At `scheduled` a request gets its blocks; at `preempted` and `state_released` it gives them back.
        # PROMPT 在 `scheduled` 请求得到块；在 `preempted`、`state_released` 归还。
        # PROMPT Between them it holds prompt_len + generated_len tokens. Keep the maxima.
        # PROMPT 其间它占 prompt_len + generated_len 个 token。记下最大值。
        if event.get("record") == "header":
            self.block_size, self.block_bytes = event["block_size"], event["block_bytes"]
        stage = event.get("stage")
        if stage in ("preempted", "state_released"):
            self.tokens.pop(event["request_id"], None)
        # END SOLUTION

    def report(self) -> dict[str, Any]:
        """The figures. 结果。"""
        # BEGIN SOLUTION exp4_t4_report
        # PROMPT {"kind": "state_counter", ...}
        return {"kind": "state_counter"}
        # END SOLUTION
