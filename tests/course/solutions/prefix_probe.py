"""Task 4, second choice: an observe-only prefix-hit probe. 任务 4 之二：仅用于观测的前缀命中探针。

    nanovllm lab run 4 --out runs/try --simulated --quick --observer starter/prefix_probe.py:PrefixProbe
    nanovllm lab check 4 runs/try

`on_event` sees every line of a run's recording as a dict, in order. `on_event` 依次看到录制的每一行。
    {"record": "header", "block_size": 16, ...}                               the first / 第一条
    {"record": "prompt", "request_id": "s0-t0", "ts_ns": 0, "token_ids": [...]}   as it entered / 进入时
    request events, {"record": "step" | "wait" | "end", ...}                  the others / 其余

`report` returns figures of the whole run. `report` 返回整个运行的数字。
    label, statement        what they are: observe-only / 它们是什么：observe-only
    prompt_tokens           of all prompts / 全部提示的 token 数
    overlap_tokens          in whole blocks seen before behind the same prefix / 在相同前缀之后出现过的整块
    requests_with_overlap   prompts with any / 有重叠的提示数
The check needs all but the last. 检查器要求除最后一项外的全部。

What it reports is a potential-overlap signal, not a realised gain. 它报告的是潜在重叠信号，不是已兑现的收益。
"""

from __future__ import annotations

from typing import Any

STATEMENT = "potential-overlap signal, not a realised gain"


class PrefixProbe:
    """How many prompt tokens stood at the beginning of an earlier prompt. 多少提示 token 曾位于更早提示的开头。"""

    def __init__(self) -> None:
        self.block_size = 0
        self.seen: set[tuple[int, ...]] = set()  # prefixes of whole blocks / 整块的前缀
        self.prompt_tokens = self.overlap_tokens = self.requests_with_overlap = 0

    def on_event(self, event: dict[str, Any]) -> None:
        """Take in one record. 读入一条记录。"""
        # BEGIN SOLUTION exp4_t4_probe_on_event
        # PROMPT For each prompt: how many of its blocks, from the first on, were seen behind the same prefix?
        # PROMPT 对每个提示：从第一块起，有多少块在相同前缀之后出现过？
        # PROMPT The block with the last prompt token never counts: one token is always computed.
        # PROMPT 含最后一个提示 token 的块不算：总有一个 token 要计算。
        if event.get("record") == "header":
            self.block_size = event["block_size"]
        if event.get("record") == "prompt":
            prompt = tuple(event["token_ids"])
            ends = range(self.block_size, len(prompt) + 1, self.block_size)
            prefixes = [prompt[:end] for end in ends]
            matchable = [prefix for prefix in prefixes if len(prefix) < len(prompt)]
            hits = next((i for i, prefix in enumerate(matchable) if prefix not in self.seen), len(matchable))
            self.prompt_tokens += len(prompt)
            self.requests_with_overlap += hits > 0
            self.overlap_tokens += hits * self.block_size
            self.seen.update(prefixes)
        # END SOLUTION

    def report(self) -> dict[str, Any]:
        """The figures, with what they are. 结果，并说明它是什么。"""
        # BEGIN SOLUTION exp4_t4_probe_report
        # PROMPT {"kind": "prefix_probe", "label": "observe-only", "statement": STATEMENT, figures}
        return {
            "kind": "prefix_probe",
            "label": "observe-only",
            "statement": STATEMENT,
            "prompt_tokens": self.prompt_tokens,
            "overlap_tokens": self.overlap_tokens,
            "requests_with_overlap": self.requests_with_overlap,
        }
        # END SOLUTION
