"""Task 4, first choice: a state counter. 任务 4 之一：状态统计器。

    nanovllm lab run 4 --out runs/try --simulated --quick --observer starter/state_counter.py:StateCounter
    nanovllm lab check 4 runs/try

`on_event` sees every line of a run's recording as a dict, in order. `on_event` 依次看到录制的每一行。
    {"record": "header", "block_size": 16, "num_blocks": 60, "block_bytes": 368640, ...}   the first / 第一条
    {"request_id": "s0-t0", "stage": "scheduled", "prompt_len": 48, "generated_len": 0, "ts_ns": 0, ...}
    {"record": "step", "free_blocks": 24, ...}   a step begins: who runs it has its blocks / 一步开始：参与者已得到块
    {"record": "wait" | "prompt" | "end", ...}   the others / 其余
Stages / 阶段: entered queued scheduled prefill_begin prefill_chunk prefill_end first_token first_handover decode_step
    output_complete preempted aborted failed state_released

`report` returns figures of the whole run. `report` 返回整个运行的数字。
    live_requests_max       most requests that held state at once / 同时占有状态的请求最多几个
    used_blocks_max         most blocks in use at the beginning of a step / 一步开始时最多用着几块
    largest_request_blocks  most blocks one request held / 一个请求最多占几块
    largest_request_bytes   the same in bytes / 同上，以字节计
The check needs the first two and compares all of them. 检查器要求前两项，比较全部。
"""

from __future__ import annotations

from typing import Any


class StateCounter:
    """Who holds state, and how much. 谁占有状态，占多少。"""

    def __init__(self) -> None:
        self.num_blocks = self.block_size = self.block_bytes = 0
        self.tokens: dict[str, int] = {}  # request_id -> tokens it holds state for / 它占有状态的 token 数
        self.live_requests_max = self.used_blocks_max = self.largest_request_blocks = 0

    def on_event(self, event: dict[str, Any]) -> None:
        """Take in one record. 读入一条记录。"""
        # BEGIN SOLUTION exp4_t4_counter_on_event
        # PROMPT A request gets its blocks when it is `scheduled`, and gives them back when it is `preempted` or over.
        # PROMPT 请求在 `scheduled` 时得到块，在 `preempted` 或结束时归还。
        # PROMPT In between it holds prompt_len + generated_len tokens, in whole blocks. `first_token` and `decode_step`
        # PROMPT are told before their token is counted: one more. What the pool lacks is in use.
        # PROMPT 其间它占 prompt_len + generated_len 个 token，按整块计。`first_token` 与 `decode_step` 发生在其 token
        # PROMPT 计入之前：要加一。池里缺的就是用着的。
        if event.get("record") == "header":
            self.block_size, self.block_bytes = event["block_size"], event["block_bytes"]
            self.num_blocks = event["num_blocks"]
        elif event.get("record") == "step":
            self.used_blocks_max = max(self.used_blocks_max, self.num_blocks - event["free_blocks"])
            blocks = (-(-tokens // self.block_size) for tokens in self.tokens.values())
            self.largest_request_blocks = max(self.largest_request_blocks, max(blocks, default=0))
        elif event.get("stage") in ("preempted", "aborted", "failed", "state_released"):
            self.tokens.pop(event["request_id"], None)
        elif event.get("stage") == "scheduled" or ("stage" in event and event["request_id"] in self.tokens):
            is_sampled = event["stage"] in ("first_token", "decode_step")
            self.tokens[event["request_id"]] = event["prompt_len"] + event["generated_len"] + is_sampled
            self.live_requests_max = max(self.live_requests_max, len(self.tokens))
        # END SOLUTION

    def report(self) -> dict[str, Any]:
        """The figures. 结果。"""
        # BEGIN SOLUTION exp4_t4_counter_report
        # PROMPT {"kind": "state_counter", "live_requests_max": ..., ...}
        return {
            "kind": "state_counter",
            "live_requests_max": self.live_requests_max,
            "used_blocks_max": self.used_blocks_max,
            "largest_request_blocks": self.largest_request_blocks,
            "largest_request_bytes": self.largest_request_blocks * self.block_bytes,
        }
        # END SOLUTION
