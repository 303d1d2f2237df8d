"""What each rule of a check says when it is broken, in English and Chinese.

What it is: one sentence a rule, and one a checklist line. What it knows nothing about: how
rules are tried. Invariants: as `wording.py`'s; `rule_NAME` has places where, found, wanted;
`list_NAME` is the line of the checklist.
"""

from __future__ import annotations

from types import MappingProxyType

_RULES = {
    "rule_manifest": (
        "{where}: edited after the run, or at odds with the recordings: {found}, not {wanted}",
        "{where}：运行后被改动，或与原始记录不符：{found}，应为 {wanted}",
    ),
    "rule_status": (
        "{where}: the run ended as {found}, not as a whole run",
        "{where}：运行状态为 {found}，不是完整的运行",
    ),
    "rule_file": ("{where}: {found}, wanted {wanted}", "{where}：{found}，应为 {wanted}"),
    "rule_raw": ("{where}: the raw log is not whole: {found}", "{where}：原始日志不完整：{found}"),
    "rule_repeats": (
        "{where}: {found} repeats; at least {wanted} are needed",
        "{where}：只有 {found} 次重复，至少需要 {wanted} 次",
    ),
    "rule_order": ("{where}: runs in the order {found}, not {wanted}", "{where}：运行次序为 {found}，应为 {wanted}"),
    "rule_pool": (
        "{where}: a pool of {found} blocks; this arm has {wanted} for every case",
        "{where}：池为 {found} 块；该臂所有 case 都应为 {wanted} 块",
    ),
    "rule_cell": ("{where} is {found}; the raw log gives {wanted}", "{where} 为 {found}；由原始日志得 {wanted}"),
    "rule_columns": (
        "{where}: the columns are {found}, the sheet's are {wanted}",
        "{where}：列为 {found}，实验单要求 {wanted}",
    ),
    "rule_label": ("{where}: labelled {found}, it is {wanted}", "{where}：标签为 {found}，应为 {wanted}"),
    "rule_bound": (
        "{where}: the state size has no approximation bound, or another one: {found}, not {wanted}",
        "{where}：状态规模没有近似边界，或边界有误：{found}，应为 {wanted}",
    ),
    "rule_relation": (
        "{where}: TTFT {found} ms is less than the queue_wait of {wanted} ms that is a part of it",
        "{where}：TTFT {found} ms 小于作为其一部分的 queue_wait {wanted} ms",
    ),
    "rule_wall": (
        "{where}: {found} waits for blocks: the pool never was the wall, so nothing is shown",
        "{where}：等待块 {found} 次：池没有成为瓶颈，什么也没有说明",
    ),
    "rule_chain": ("{where} is {found}; the runs say {wanted}", "{where} 为 {found}；运行结果为 {wanted}"),
    "rule_statement": ("{where} is {found}; wanted {wanted}", "{where} 为 {found}；应为 {wanted}"),
    "rule_probe": (
        "{where}: what a probe observed is written as a gain: {found}",
        "{where}：把探针的观测写成了收益：{found}",
    ),
    "rule_generated": (
        "{where} is not what the raw logs and the manifest give: {found}, not {wanted}",
        "{where} 与原始日志和 manifest 所给出的不符：{found}，应为 {wanted}",
    ),
    "rule_diagram": (
        "{where}: the diagram is missing, or is not of this run: {found} {wanted}",
        "{where}：缺少该图，或该图不是本次运行的：{found} {wanted}",
    ),
    "rule_observer": (
        "{where} is {found}; the reference is {wanted}",
        "{where} 为 {found}；参考值为 {wanted}",
    ),
    "rule_identity": ("{where}: {found} is empty, or is none", "{where}：{found} 为空，或不成其为一项"),
    "rule_lifecycle": ("{where}: {found} {wanted}", "{where}：{found} {wanted}"),
    "rule_explanation": ("{where}: the column 解释 is empty", "{where}：解释 一列为空"),
    "rule_chain_text": (
        "{where}: the chain has {found} arrows; from context to TTFT it takes {wanted}",
        "{where}：因果链只有 {found} 个箭头；从上下文到 TTFT 至少 {wanted} 个",
    ),
    "rule_extension": ("{where}: {found} {wanted}", "{where}：{found} {wanted}"),
    "rule_probe_statement": (
        "{where}: a report with a probe must say that it is a potential-overlap signal and not a realised reuse gain",
        "{where}：使用探针的报告必须写明：这是潜在重叠信号，不是已经兑现的真实复用收益",
    ),
    "rule_result": ("{where}: {found} is empty", "{where}：{found} 为空"),
    "rule_analysis": ("{where}: {found}; {wanted} are asked for", "{where}：{found}；要求 {wanted}"),
    "rule_scope": (
        "{where}: says nothing of {found}; state has to be tied to concurrency and waiting",
        "{where}：没有提到{found}；必须说明状态如何影响并发与等待",
    ),
    "rule_figures": (
        "{where}: cites {found} figures of your run (live_requests, estimated_kv, TTFT, queue_wait); "
        "{wanted} are asked for",
        "{where}：引用了本次运行的 {found} 个数字（live_requests、estimated_kv、TTFT、queue_wait）；要求 {wanted} 个",
    ),
    "rule_draft": (
        "{where}: what a program wrote stands there still: {found} {wanted}",
        "{where}：仍有草稿标记或程序写的文字：{found} {wanted}",
    ),
    # -- reasons, as `found` or `wanted` of a finding ------------------------------------------------
    "why_no_basis": ("the basis of the judgement is empty", "判断依据为空"),
    "why_no_symbol": ("no file.py::symbol is named", "没有写出 file.py::symbol"),
    "why_unknown_symbol": ("is not in nanovllm/", "不在 nanovllm/ 中"),
    "why_one_symbol": ("stands for every row", "每一行写的都是它"),
    "why_unchanged": ("only the mark is gone:", "只删了标记："),
    "why_choose": (
        "choose one of the two: state counter, observe-only probe",
        "二选一：状态统计器、仅用于观测的前缀命中探针",
    ),
    "why_empty": ("empty:", "为空："),
    "why_no_observer": (
        "no observer was run: nanovllm lab run 4 --observer FILE.py:NAME",
        "没有运行观测器：nanovllm lab run 4 --observer FILE.py:NAME",
    ),
    "why_other_kind": ("is not what is chosen; the run had", "与所选不符；运行中的是"),
    "why_state": ("resident state", "状态驻留"),
    "why_concurrency": ("concurrency", "并发"),
    "why_waiting": ("waiting", "等待"),
    # -- what a rule of the checklist stands for -----------------------------------------------------
    "list_manifest": ("manifest unedited, and as the recordings say", "manifest 未改动，且与记录一致"),
    "list_status": ("the run is whole", "运行完整"),
    "list_file": ("every file as it was sealed", "每个文件与封存时一致"),
    "list_raw": ("raw logs whole", "原始日志完整"),
    "list_repeats": ("three repeats", "至少三次重复"),
    "list_order": ("alternating order", "交替次序"),
    "list_pool": ("one block count for all cases", "所有 case 块数相同"),
    "list_cell": ("every figure follows from the raw logs", "每个数字可由原始日志重算"),
    "list_columns": ("the sheet's columns", "列与实验单一致"),
    "list_label": ("labels", "标签"),
    "list_bound": ("approximation bound of state sizes", "状态规模的近似边界"),
    "list_relation": ("queue_wait within TTFT", "queue_wait 不超过 TTFT"),
    "list_wall": ("the pool was the wall", "池确实成为瓶颈"),
    "list_chain": ("causal chain as the runs say", "因果链与运行一致"),
    "list_statement": ("result statement", "结果说明"),
    "list_probe": ("no probe figure written as a gain", "没有把探针写成收益"),
    "list_generated": ("README and explanations as the run gives them", "README 与 解释 由运行结果生成"),
    "list_diagram": ("diagrams of this run", "本次运行的图"),
    "list_observer": ("the observer's figures equal the reference", "观测器数字与参考一致"),
    "list_identity": ("name, number, date, environment", "姓名、学号、日期、环境"),
    "list_lifecycle": ("lifecycle table with its basis", "生命周期表与判断依据"),
    "list_explanation": ("explanations", "解释"),
    "list_chain_text": ("a causal chain in your words", "自己的因果链"),
    "list_extension": ("one extension, implemented and run", "一项扩展，已实现并运行"),
    "list_probe_statement": ("probe statement", "探针说明"),
    "list_result": ("result statement in your words", "自己的结果说明"),
    "list_analysis": ("analysis of 500 to 800 characters", "500-800 字分析"),
    "list_figures": ("analysis cites figures of the run", "分析引用本次运行的数字"),
    "list_scope": ("analysis ties state to concurrency and waiting", "分析说明状态如何影响并发与等待"),
    "list_draft": ("no draft left, marked or not", "没有草稿，无论有无标记"),
}
RULES = MappingProxyType(_RULES)
