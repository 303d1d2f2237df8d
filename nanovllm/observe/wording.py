"""The prose that readers of recordings print, in English and Chinese, from one table.

What it is: sentences with named places to fill. What it knows nothing about: who prints
them. Invariants: both languages have the same keys and the same places; identifiers,
stages, terms and labels stay English in both.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

Lang = Literal["en", "zh"]

_PROSE = {
    # -- the sequence diagram ----------------------------------------------------------------------
    "entered": ("request entered: {prompt_len} prompt tokens", "请求进入：提示 {prompt_len} 个 token"),
    "admitted": ("admitted after T_queue {ms} ms", "排队 T_queue {ms} ms 后准入"),
    "readmitted": ("admitted again", "再次准入"),
    "allocate": (
        "creation: allocate {blocks} blocks for {tokens} tokens",
        "生成：为 {tokens} 个 token 分配 {blocks} 个块",
    ),
    "resident": (
        "residency: KV of {tokens} tokens in {blocks} blocks",
        "驻留：{tokens} 个 token 的 KV 占 {blocks} 个块",
    ),
    "prefill_start": ("prefill start", "prefill 开始"),
    "first_token": ("first token, TTFT {ms} ms", "首个 token，TTFT {ms} ms"),
    "decode_start": ("decode start", "decode 开始"),
    "output_complete": ("output complete: {generated_len} tokens", "输出完成：{generated_len} 个 token"),
    "read": (
        "residency: {steps} steps read {low} to {high} tokens' KV, add 1 each",
        "驻留：{steps} 步读取 {low} 至 {high} 个 token 的 KV，各追加 1 个",
    ),
    "extend": ("extension: block {blocks}, for token {tokens}", "扩展：第 {blocks} 个块，为第 {tokens} 个 token"),
    "extend_more": ("extension: {count} times more, to {blocks} blocks", "扩展：再 {count} 次，至 {blocks} 个块"),
    "state_released": ("release: state released, {blocks} blocks", "释放：状态释放，归还 {blocks} 个块"),
    "preempted": ("release: preempted, {blocks} blocks; tokens kept", "释放：被抢占，{blocks} 个块被收回；token 保留"),
    "ended": ("ended: {end}", "结束：{end}"),
    "title": ("{name}: control transfer, {label} times", "{name}：控制权转移，时间标签 {label}"),
    "client": ("client", "客户端"),
    "queue": ("queue", "队列"),
    "scheduler": ("scheduler", "调度器"),
    "prefill": ("prefill", "prefill"),
    "decode": ("decode", "decode"),
    "block_pool": ("block pool", "块池"),
    # -- what a cause means ------------------------------------------------------------------------
    "cause_long_step": ("came while a long step ran", "到达时一个很长的 step 正在执行"),
    "cause_intake": ("validation, template and tokenizer", "校验、模板与分词"),
    "cause_batch_cap": ("the batch cap max_num_seqs is reached", "达到批大小上限 max_num_seqs"),
    "cause_arrival_burst": (
        "most of a busy period's requests came at its beginning; evenly spread over the run, the limits would keep up",
        "忙期的大部分请求在开头同时到达；若在整次运行中均匀到达，现有上限足以应付",
    ),
    "cause_token_budget": (
        "the step's token budget max_num_batched_tokens is used up",
        "该 step 的 token 预算 max_num_batched_tokens 已用完",
    ),
    "cause_admission_cap": (
        "max_new_requests_per_step admits no more in this step",
        "max_new_requests_per_step 限制了本 step 的新准入",
    ),
    "cause_policy": ("the policy kept it out, or ranked later arrivals first", "策略不准入，或让后到的请求先行"),
    "cause_head_of_line": (
        "would fit, but stands behind one that does not",
        "自己放得下，但排在放不下的请求之后（队头阻塞）",
    ),
    "cause_producer": ("waits for a prefix that another request computes now", "等待另一请求正在计算的前缀"),
    "cause_not_told": ("queued, and no record says why", "在排队，但没有记录说明原因"),
    "cause_blocks_exhausted": ("more blocks are needed than are free", "所需块数多于空闲块数"),
    "cause_fragmentation": (
        "blocks are short, and at least half of the held slots are empty",
        "块不足，而被占用的槽位至少一半是空的（内部碎片）",
    ),
    "cause_reservation": (
        "blocks are free, but kept for growth and the watermark",
        "有空闲块，但为增长与水位线而预留",
    ),
    "cause_preemption": ("its blocks were taken; it waits and computes its KV again", "块被收回：等待并重新计算 KV"),
    "cause_state_load": ("its state is being loaded (T_state)", "状态正在装载（T_state）"),
    "cause_prefill": ("computes its own prompt", "计算自己的提示（prefill）"),
    "cause_prefill_of_others": ("shares its steps with the prefill of others", "与其他请求的 prefill 共用 step"),
    "cause_decode": ("decodes slower than this run's fastest steps", "decode 慢于本次运行最快的 step"),
    "cause_uneven_steps": (
        "single steps take longer than those around them with the same batch",
        "个别 step 比相邻且批大小相同的 step 更慢",
    ),
    "cause_output": ("between steps: scheduling, hand-over, whoever reads", "step 之间：调度、移交、读取方"),
    # -- what would refute it ----------------------------------------------------------------------
    "refute_long_step": (
        "Cut prefill shorter (--max-prefill-chunk): if this wait stays, it was not the long step.",
        "把 prefill 切短（--max-prefill-chunk）：若等待不变，则不是长 step 所致。",
    ),
    "refute_intake": (
        "Send token ids instead of text: if T_intake stays, it was not the tokenizer.",
        "直接发送 token id：若 T_intake 不变，则不是分词所致。",
    ),
    "refute_batch_cap": (
        "Raise --max-num-seqs: if T_queue stays, the cap was not the cause.",
        "提高 --max-num-seqs：若 T_queue 不变，则上限不是原因。",
    ),
    "refute_arrival_burst": (
        "Send the same requests evenly spread over the run: if T_queue stays, the burst was not the cause.",
        "把同样的请求在整次运行中均匀发送：若 T_queue 不变，则突发到达不是原因。",
    ),
    "refute_token_budget": (
        "Raise --max-num-batched-tokens: if the wait stays, the budget was not the cause.",
        "提高 --max-num-batched-tokens：若等待不变，则预算不是原因。",
    ),
    "refute_admission_cap": (
        "Raise --max-new-requests-per-step: if T_queue stays, it was not this cap.",
        "提高 --max-new-requests-per-step：若 T_queue 不变，则不是该上限所致。",
    ),
    "refute_policy": (
        "Run with --policy fcfs and --prefill-during-decode true: if T_queue stays, it was not the policy.",
        "用 --policy fcfs 与 --prefill-during-decode true 再运行：若 T_queue 不变，则不是策略所致。",
    ),
    "refute_head_of_line": (
        "Leave the request named behind it out: if T_queue stays, it was not the head of the line.",
        "去掉被指出的队头请求：若 T_queue 不变，则不是队头阻塞。",
    ),
    "refute_producer": (
        "Run with --prefix-mode off: if TTFT falls, following cost more than it saved.",
        "用 --prefix-mode off 再运行：若 TTFT 下降，则跟随得不偿失。",
    ),
    "refute_not_told": (
        "Record again with a larger --event-capacity: the missing records would name the cause.",
        "用更大的 --event-capacity 重新记录：缺失的记录会指出原因。",
    ),
    "refute_blocks_exhausted": (
        "Double --num-blocks: T_queue must fall while T_prefill stays, else blocks were not the cause.",
        "把 --num-blocks 加倍：T_queue 应下降而 T_prefill 不变，否则块不是原因。",
    ),
    "refute_fragmentation": (
        "Use a smaller --block-size at the same bytes: if T_queue stays, it was not fragmentation.",
        "在相同字节数下减小 --block-size：若 T_queue 不变，则不是碎片所致。",
    ),
    "refute_reservation": (
        "Lower --watermark, or shorten max_tokens: if T_queue stays, it was not the reservation.",
        "降低 --watermark 或缩短 max_tokens：若 T_queue 不变，则不是预留所致。",
    ),
    "refute_preemption": (
        "Double --num-blocks: preemptions must vanish and the gaps with them.",
        "把 --num-blocks 加倍：抢占及相应的间隔应消失。",
    ),
    "refute_state_load": (
        "Start warm on the device: if the wait stays, it was not the load.",
        "以设备上的热状态启动：若等待不变，则不是装载所致。",
    ),
    "refute_prefill": (
        "Shorten the prompt: T_prefill must fall with it.",
        "缩短提示：T_prefill 应随之下降。",
    ),
    "refute_prefill_of_others": (
        "Run it without the requests named behind it: if the gaps stay, it was not their prefill.",
        "去掉被指出的请求再运行：若间隔不变，则不是它们的 prefill 所致。",
    ),
    "refute_decode": (
        "Run it alone: if TPOT stays, neither batch nor context length was the cause.",
        "单独运行：若 TPOT 不变，则不是批大小或上下文长度所致。",
    ),
    "refute_uneven_steps": (
        "Run the same again with nothing else on the machine: if the same steps are slow, it was not the machine.",
        "在没有其他负载的机器上重复：若还是同样的 step 变慢，则不是机器所致。",
    ),
    "refute_output": (
        "Run it with nobody reading (nanovllm run --quiet > /dev/null): if the time stays, it was not the reader.",
        "在无人读取时运行（nanovllm run --quiet > /dev/null）：若时间不变，则不是读取方所致。",
    ),
    # -- verdicts and lines ------------------------------------------------------------------------
    "verdict_line": ("{scope}: {verdict}", "{scope}：{verdict}"),
    "verdict_dominant cause": ("dominant cause", "主导原因"),
    "verdict_mixture": ("a mixture of causes", "多个原因混合"),
    "verdict_no dominant cause": ("no dominant cause", "没有主导原因"),
    "scope_run": ("the whole run (requests: {requests})", "整次运行（请求数 {requests}）"),
    "scope_request": ("request {request}", "请求 {request}"),
    "shares": (
        "Shares are of {total} ms of request time ({label}); {work} of it is decoding at the run's own best pace.",
        "份额以请求总时间 {total} ms（{label}）计；其中 {work} 是以本次运行最快节奏进行的 decode。",
    ),
    "stage": (
        "dominant stage: {stage}, {share} of the time ({label})",
        "主导阶段：{stage}，占时间 {share}（{label}）",
    ),
    "behind": ("behind it: {names}", "背后：{names}"),
    "evidence": ("record {record} explains {ms} ms: {told}", "记录 {record} 解释了 {ms} ms：{told}"),
    "blocks_held": ("blocks held then (estimated): {held}", "当时占用的块（estimated）：{held}"),
    "both_limits": (
        "batch_cap and blocks_exhausted hold at once: lift both, one alone shortens no wait of theirs",
        "batch_cap 与 blocks_exhausted 同时成立：须同时放宽，只放宽其一不会缩短这些等待",
    ),
    "refuted": ("would refute it: {text}", "可否定它的实验：{text}"),
    "outlier": (
        "slow by itself: {request}, TTFT {ms} ms: {causes}, {share} ({label})",
        "个别较慢：{request}，TTFT {ms} ms：{causes}，{share}（{label}）",
    ),
    # -- trace show and compare --------------------------------------------------------------------
    "sums": ("checked: TTFT = {ttft} ns is the sum of its four terms", "已核对：TTFT = {ttft} ns 等于四项之和"),
    "sums_end": ("checked: end to end = {total} ns", "已核对：端到端 = {total} ns"),
    "no_sums": ("not checked: the request did not complete", "未核对：请求没有完成"),
    "cold_warm": (
        "prior state: {first} in the first run, {second} in the second: part of the difference may be reuse",
        "先前状态：第一次为 {first}，第二次为 {second}：差异中可能有复用的成分",
    ),
}
PROSE = MappingProxyType(_PROSE)


def say(lang: Lang, key: str, **places: object) -> str:
    """The sentence `key` in `lang`, its places filled."""
    return PROSE[key][lang == "zh"].format(**places)
