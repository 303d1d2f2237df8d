"""What a student writes into submission.md: the figures stay, every draft is replaced.

What it is: one honest set of answers in each language, for a state counter, and the hand that writes them into the
form; the analyses are files beside the solutions.
"""

from __future__ import annotations

from pathlib import Path

SOLUTIONS = Path(__file__).parent / "solutions"
SYMBOLS = (
    "nanovllm/engine/llm_engine.py::LLMEngine.step",
    "nanovllm/engine/block_manager.py::BlockManager.may_append",
    "nanovllm/engine/block_manager.py::BlockManager.deallocate",
    "nanovllm/engine/sequence.py::Sequence.block_table",
)
COUNTER = "starter/state_counter.py::StateCounter"
ANSWERS = {
    "en": {
        "12.1": ["Li Lei", "M0001", None, None],
        "12.2": [
            "`allocate` is called once before `prefill_begin`, and the free count falls by the prompt's blocks.",
            "`free` falls by one each time a block is full; between that only `decode_step` records follow.",
            "`deallocate` stands beside `state_released`, and the free count is back where it was.",
            "Every record of the log and every call of the block manager bears the same `request_id`.",
        ],
        "12.3": [
            "All clients hold blocks at once; nobody waits for the pool.",
            "Two or three of them fill the pool; the others wait for blocks, and that is most of their TTFT.",
            "Short requests stand behind long ones that wait for blocks: head of the line.",
        ],
        "12.4": "longer context -> more blocks a request -> fewer live requests -> longer T_queue -> worse TTFT; "
        "refuted if T_queue did not fall on the roomy pool, or if T_prefill fell with it.",
        "12.5": ["state counter", COUNTER, "Most live requests and most blocks agree with the pool's own count."],
        "12.6": [
            "estimated_kv and live_requests",
            "the change of T_queue between the pools",
            "other models and machines",
        ],
    },
    "zh": {
        "12.1": ["李雷", "M0001", None, None],
        "12.2": [
            "`prefill_begin` 之前有一次 `allocate`，free 减少的正是提示的块数。",
            "每填满一块，free 减一；其间只有 `decode_step` 记录。",
            "`state_released` 旁边是 `deallocate`，free 回到原来的数值。",
            "日志的每条记录与块管理器的每次调用都带着同一个 `request_id`。",
        ],
        "12.3": [
            "所有客户端同时占有块，没有人等池。",
            "两三个请求就占满了池，其余在等块，这构成了 TTFT 的大部分。",
            "短请求排在等块的长请求之后，被队头挡住。",
        ],
        "12.4": "上下文变长 -> 每请求的块变多 -> 能同时存活的请求变少 -> T_queue 变长 -> TTFT 变差；"
        "若在宽裕的池上 T_queue 不降，或 T_prefill 随之下降，则被否定。",
        "12.5": ["状态统计器", COUNTER, "同时存活的请求数与用着的块数的最大值与池自己的计数一致。"],
        "12.6": ["estimated_kv 与 live_requests", "两种池之间 T_queue 的变化", "其他模型与机器"],
    },
}


def fill(form: str, lang: str) -> str:
    """The form with a person's words in it."""
    answers, part, row, lines = ANSWERS[lang], "", 0, []
    for line in form.splitlines():
        if line.startswith("## "):
            part, row = line.split()[1], -2  # the table's head and its rule come first
        elif line.startswith("|"):
            line = _row(line, part, row, answers) if row >= 0 else line
            row += 1
        elif part == "12.4" and line.strip():
            line = answers["12.4"]
        lines.append(line)
    return "\n".join([*lines, "", analysis(form, lang)])


def analysis(form: str, lang: str) -> str:
    """The analysis, with the figures of the form's row of long_ctx."""
    row = next(line for line in form.splitlines() if line.startswith("| long_ctx |"))
    ttft, queue = (cell.split()[0] for cell in row.split("|")[6:8])
    text = (SOLUTIONS / f"analysis.{lang}.md").read_text(encoding="utf-8")
    return text.replace("{TTFT}", ttft).replace("{queue_wait}", queue)


def _row(line: str, part: str, row: int, answers: dict) -> str:
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    if part == "12.2":
        cells[1] = f"`{SYMBOLS[row]}`"
    if (answer := answers[part][row]) is not None:
        cells[-1] = answer
    return f"| {' | '.join(cells)} |"
