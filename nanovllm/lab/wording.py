"""The prose that labs print and write, in English and Chinese, from one table.

What it is: sentences with named places to fill. What it knows nothing about: who prints
them. Invariants: both languages have the same keys and the same places; identifiers,
columns, terms and labels stay English in both, but for the column the sheet itself calls 解释.
"""

from __future__ import annotations

from types import MappingProxyType

from nanovllm.lab.cache_wording import CACHE
from nanovllm.lab.rule_wording import RULES
from nanovllm.observe.wording import Lang

_PROSE = {
    # -- a run ---------------------------------------------------------------------------------------
    "run_done": ("The bundle is in {out}. The chain: {verdict}.", "证据包在 {out}。因果链：{verdict}。"),
    "run_next": ("Check it: nanovllm lab check 4 {out}", "检查：nanovllm lab check 4 {out}"),
    "check_pass": ("{bundle}: every rule holds.", "{bundle}：全部规则通过。"),
    "not_evaluated": ("not evaluated", "未评估"),
    "check_fail": ("{bundle}: {count} findings.", "{bundle}：发现 {count} 处问题。"),
    # -- explanations and the chain ------------------------------------------------------------------
    "explain_free": (
        "a request holds {blocks} of {pool} blocks in its last step: all {concurrency} clients' requests fit at once "
        "(most live: {most}), none waits for blocks; queue_wait {queue} ms of TTFT {ttft} ms",
        "每个请求最后一步占用 {blocks} 块（池共 {pool} 块）：{concurrency} 个客户端的请求可同时驻留（最多 "
        "{most} 个存活），"
        "无人等待块；TTFT {ttft} ms 中 queue_wait 为 {queue} ms",
    ),
    "explain_waited": (
        "a request holds {blocks} of {pool} blocks in its last step: at most {most} of {concurrency} clients' "
        "requests "
        "are resident, the others wait for blocks; queue_wait {queue} ms of TTFT {ttft} ms",
        "每个请求最后一步占用 {blocks} 块（池共 {pool} 块）：{concurrency} 个客户端中最多 {most} 个请求驻留，"
        "其余等待块；"
        "TTFT {ttft} ms 中 queue_wait 为 {queue} ms",
    ),
    "chain_line": (
        "longer context ({context} tokens) -> more residency ({residency} MiB a request) -> fewer live requests "
        "({live_requests}) -> longer wait (T_queue {queue_wait} ms) -> worse TTFT ({TTFT} ms). Verdict: {verdict}",
        "上下文变化：上下文变长（{context} token）-> 状态驻留增大（每请求 {residency} MiB）-> "
        "可并发请求减少（{live_requests}）"
        "-> 等待时间上升（T_queue {queue_wait} ms）-> TTFT 变差（{TTFT} ms）。结论：{verdict}",
    ),
    "change_line": (
        "{case}, pool {small} -> {large} blocks: T_queue {queue} ms (runs of one arm differ by {noise}), "
        "T_prefill {prefill} ms (bound {bound}, of {of}), TTFT {ttft} ms "
        "({label}; means of paired differences): {verdict}",
        "{case}，池 {small} -> {large} 块：T_queue {queue} ms（同臂差异 {noise}），T_prefill {prefill} ms"
        "（界 {bound}，取自 {of}），"
        "TTFT {ttft} ms（{label}；同一请求配对差的均值）：{verdict}",
    ),
    "chain_rule": (
        "Fixed before the run: the chain is refuted unless every link stands as above and, on the larger pool, "
        "blocks are "
        "never waited for, T_queue and TTFT fall in every repeat and by more than runs of one arm differ, and "
        "T_prefill "
        "stays: it changes by at most {share} of what T_queue does or by what runs of one arm differ (the larger of "
        "the two), and never by more than {own} of itself. `not tested`: with the smaller pool nobody waited "
        "for blocks.",
        "运行前已固定的判据：上述每一环成立，且在更大的池上无人等待块、T_queue 与 TTFT "
        "在每次重复中都下降并超过同臂差异、"
        "T_prefill 的变化不超过 T_queue 变化的 {share} 与其同臂差异中的较大者，"
        "且不超过其自身的 {own}，否则该链被否定。`not tested`：较小的池上也无人等待块。",
    ),
    # -- the basis of the lifecycle table ------------------------------------------------------------
    "basis_prefill": (
        "{file}: {request} is scheduled in record {scheduled} and its prefill ends in record {end}: {blocks} blocks",
        "{file}：{request} 在记录 {scheduled} 被调度，prefill 结束于记录 {end}：{blocks} 块",
    ),
    "basis_decode": (
        "{file}: {request} has {count} decode_step records, {first} to {last}: each reads its KV and adds one token",
        "{file}：{request} 有 {count} 条 decode_step 记录（{first} 至 {last}）：每步读取其 KV 并追加一个 token",
    ),
    "basis_release": (
        "{file}: state_released of {request} is record {released}",
        "{file}：{request} 的 state_released 为记录 {released}",
    ),
    "basis_binding": (
        "{file}: {count} records carry request_id {request}; blocks belong to its sequence's block_table",
        "{file}：{count} 条记录带有 request_id {request}；块属于其 Sequence 的 block_table",
    ),
    # -- notes.md ------------------------------------------------------------------------------------
    "notes_title": ("Notes", "说明"),
    "notes_anomalies": ("Anomalies and failures", "异常与失败"),
    "notes_overturn": ("What would overturn it", "什么会推翻结论"),
    "notes_uncontrolled": ("Not controlled", "未控制的变量"),
    "notes_own": ("Your notes", "你的补充"),
    "note_load": (
        "Load average {loads} on {cpus} CPUs: other processes were at work. Times are those of a busy machine.",
        "{cpus} 个 CPU 上平均负载 {loads}：有其他进程在运行，时间为繁忙机器上的时间。",
    ),
    "note_dirty": (
        "Tracked files differed from the commit.",
        "运行时被跟踪的文件与提交不同（dirty）。",
    ),
    "note_simulated": (
        "No model ran: times come from a cost table and a virtual clock. They show relations, not speed.",
        "没有运行模型：时间来自成本表与虚拟时钟，只说明关系，不说明速度。",
    ),
    "note_preemptions": ("{count} preemptions over all runs.", "全部运行中共 {count} 次抢占。"),
    "note_refuted": (
        "{case}, arms {arms}: refuted by {tests}.",
        "{case}，{arms} 臂：被 {tests} 否定。",
    ),
    "note_none": ("None found.", "未发现。"),
    "overturn_chain": (
        "T_queue that stays on the larger pool, or falls together with T_prefill, refutes the chain.",
        "若在更大的池上 T_queue 不降，或与 T_prefill 一同下降，则因果链被否定。",
    ),
    "overturn_size": (
        "Blocks counted by the pool that differ from those estimated from lengths refute the state sizes.",
        "若池计数的块数与由长度估计的块数不符，则状态规模估计被否定。",
    ),
    "uncontrolled": (
        "Frequency of the processor, other processes, temperature of caches; runs alternate to spread them evenly.",
        "处理器频率、其他进程、缓存冷热；各运行交替进行以使其均匀分布。",
    ),
    # -- README.md -----------------------------------------------------------------------------------
    "readme_title": ("Experiment 4: KV state and how its residency bounds concurrency", "实验 4：KV 状态与缓存组织"),
    "readme_question": (
        "Question: why is much of what looks like a scheduling or a latency problem one of resident state and "
        "capacity?",
        "问题：不少表面上出在调度或延迟上的毛病，为什么归根到底是状态驻留与容量造成的？",
    ),
    "readme_run": ("How it ran", "如何运行"),
    "ran_on": ("{environment}; commit {commit}", "{environment}；提交 {commit}"),
    "ran_pools": (
        "{runs} runs: {repeats} repeats in alternating order, each on a cold engine; blocks in the pool: base "
        "{base}, "
        "roomy {roomy}, tight {tight}",
        "{runs} 次运行：{repeats} 次重复、正反交替，每次均从冷状态开始；池块数：base {base}，roomy {roomy}，"
        "tight {tight}",
    ),
    "ran_kv": ("KV bytes of a token (estimated): {formula}", "每 token 的 KV 字节（estimated）：{formula}"),
    "readme_table": ("State capacity", "状态容量观察表"),
    "table_legend": (
        "Labels: estimated_kv is `estimated`, all other columns `{label}`. live_requests: sequences that hold "
        "blocks. "
        "estimated_kv: one request in its last step, blocks x bytes of a block. TTFT and queue_wait (T_queue) in ms, "
        "medians over the repeats of each run's median, P99 beside. Where a case has two lengths both are listed.",
        "标签：estimated_kv 为 `estimated`，其余列为 `{label}`。live_requests：持有块的序列数。estimated_kv："
        "单个请求在最后一步的"
        "块数 x 每块字节。TTFT 与 queue_wait（T_queue）单位 ms，为各次运行中位数的中位数，旁为 P99。"
        "含两种长度的 case 两者都列出。",
    ),
    "table_bound": (
        "Approximation bound of the size: token-exact is at most {bytes} bytes a request below block-exact "
        "(empty slots of "
        "the last block). Blocks estimated from lengths never differed by more than {error} from those the "
        "pool counted.",
        "状态规模的近似边界：token-exact 每请求最多比 block-exact 少 {bytes} 字节（最后一块的空槽）。"
        "由长度估计的块数与池实际计数"
        "之差从未超过 {error}。",
    ),
    "readme_blocks": ("Total blocks", "总块数"),
    "blocks_pool": (
        "The pool of all three cases: {pool} blocks ({label}).",
        "三类 case 共用的池：{pool} 块（{label}）。",
    ),
    "blocks_used": ("{case}: in use mean {mean}, most {most}", "{case}：使用中 均值 {mean}，最多 {most}"),
    "readme_chain": ("The causal chain, tested by intervention", "因果链，用干预检验"),
    "readme_probe": ("Prefix overlap, observed only", "前缀重叠（仅观测）"),
    "probe_text": (
        "All prompts begin with the same tokens. Nothing was reused; what could have been is a signal and no more:",
        "所有提示以相同 token 开头。没有发生复用；下面只是潜在重叠信号，不是已经兑现的真实复用收益：",
    ),
    "readme_statement": ("What may be concluded", "结果说明"),
    "readme_diagrams": ("Diagrams", "图"),
    "readme_diagrams_text": (
        "diagrams/kv_lifecycle.svg (and .mmd): {request} of run {run}, from its entry to the release of its state. "
        "diagrams/residency.svg: who waits and who holds blocks. diagrams/intervention.svg: the chain's test.",
        "diagrams/kv_lifecycle.svg（及 .mmd）：运行 {run} 中 {request} 从进入到状态释放。"
        "diagrams/residency.svg：谁在等待、谁持有块。"
        "diagrams/intervention.svg：因果链的检验。",
    ),
    "readme_again": ("Checking it", "复查"),
    "readme_again_text": (
        "`nanovllm lab check 4 BUNDLE` computes every figure again from raw/. `nanovllm trace show "
        "raw/RUN.jsonl` shows one run.",
        "`nanovllm lab check 4 BUNDLE` 由 raw/ 重新计算每个数字。`nanovllm trace show raw/RUN.jsonl` 查看单次运行。",
    ),
    "statement_observation_text": (
        "live_requests, total blocks and estimated_kv are observations of state; the prefix overlap is a "
        "potential-overlap "
        "signal, not a realised gain.",
        "live_requests、总块数与 estimated_kv 是对状态的观测；前缀重叠是潜在重叠信号，不是已经兑现的真实复用收益。",
    ),
    "statement_real_measured": (
        "the change of T_queue and TTFT between two pools was measured, on this machine, model and workload",
        "两种池之间 T_queue 与 TTFT 的变化是在本机、本模型、本负载上测得的真实效果",
    ),
    "statement_real_simulated": (
        "none: on a virtual clock nothing was measured",
        "无：虚拟时钟上没有任何测量",
    ),
    "statement_not_yet_text": (
        "what reuse would bring, other models, other machines, other arrival patterns",
        "复用会带来什么、其他模型、其他机器、其他到达模式",
    ),
    # -- submission.md -------------------------------------------------------------------------------
    "submission_title": ("Experiment 4: submission", "实验 4：提交"),
    "submission_how": (
        "Replace whatever bears a draft mark by your own words and delete the mark; leave the figures as they are. "
        "Then: `nanovllm lab check 4 BUNDLE --submission`.",
        "把带草稿标记的内容改成自己的话并删去标记；数字保持不变。然后：`nanovllm lab check 4 BUNDLE "
        "--submission --lang zh`。",
    ),
    "item": ("item", "项"),
    "content": ("content", "内容"),
    "part_1": ("Basic information", "基本信息"),
    "part_2": ("State lifecycle record", "状态生命周期记录"),
    "part_3": ("Capacity observation table", "容量观察表"),
    "part_4": ("Causal chain", "因果链"),
    "part_5": ("Extension", "扩展观察"),
    "part_6": ("Result statement", "结果说明"),
    "identity_name": ("Name / team", "姓名 / 组员"),
    "identity_student_id": ("Student number", "学号"),
    "identity_date": ("Date of the experiment", "实验日期"),
    "identity_environment": ("Model and environment", "模型与环境"),
    "lifecycle_event_column": ("lifecycle event", "生命周期事件"),
    "lifecycle_object_column": ("file / function / object", "文件 / 函数 / 对象"),
    "lifecycle_basis_column": ("basis of the judgement", "判断依据"),
    "lifecycle_prefill": ("prefill makes state", "prefill 产生状态"),
    "lifecycle_decode": ("decode reads / appends state", "decode 读取 / 追加状态"),
    "lifecycle_release": ("state is released at completion", "完成后释放状态"),
    "lifecycle_binding": ("state is bound to a request_id", "状态绑定 request_id"),
    "chain_begin": ("change of context ->", "上下文变化 ->"),
    "extension_choice": ("Chosen", "选择的是"),
    "extension_choices": (
        "state counter / observe-only prefix-hit probe",
        "状态统计器 / 仅用于观测的前缀命中探针",
    ),
    "extension_where": ("Implemented in", "实现位置"),
    "extension_conclusion": ("What was observed", "观测结论"),
    "statement_observation": ("Observation signal only", "只是观测信号"),
    "statement_real": ("May be read as a real gain", "可以当作真实收益"),
    "statement_not_yet": ("Not yet", "还不能"),
    "analysis_title": ("Analysis (500-800 characters 字; in English 300-550 words)", "分析（500-800 字）"),
    "analysis_how": (
        "<!-- How does state bound what the system can do? State, concurrency and waiting, with figures from "
        "above. -->",
        "<!-- 状态如何约束系统能力边界？写清状态驻留、并发与等待，引用上面的数字。 -->",
    ),
}
PROSE = MappingProxyType({**_PROSE, **RULES, **CACHE})


def say(lang: Lang, key: str, **places: object) -> str:
    """The sentence `key` in `lang`, its places filled."""
    return PROSE[key][lang == "zh"].format(**places)
