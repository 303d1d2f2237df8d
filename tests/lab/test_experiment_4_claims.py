"""Sentences that make a gain of what a probe saw, in English and Chinese."""

from __future__ import annotations

import pytest

from nanovllm.lab.experiment_4.claims import gains_of_a_probe


@pytest.mark.parametrize(
    ("text", "is_a_gain"),
    [
        ("前缀探针看到 61% 的重叠，节省了 300 ms。", True),
        ("The probe shows a speedup of 2x.", True),
        ("Prefix overlap improved TTFT.", True),
        ("前缀命中使 TTFT 缩短 40%。", True),
        ("前缀命中率 61%，TTFT 下降 40%，吞吐翻倍。", True),
        ("探针不是白做的：前缀命中带来 40% 加速。", True),
        ("前缀命中不是偶然，TTFT 降低了 40%。", True),
        ("毫无疑问前缀重叠节省了时间。", True),
        ("There is no doubt that the prefix overlap gives a 40 % speedup.", True),
        ("The probe shows TTFT drops 40 %.", True),
        ("The probe shows TTFT drops 40 % thanks to hits.", True),
        ("Shared prefixes make prompts 40 % cheaper and cut TTFT.", True),
        ("Prefix reuse is not a gain on paper, it halves TTFT.", True),
        ("The overlap is not only a signal but saves half the prefill.", True),
        ("The overlap doubles throughput without a change of the pool.", True),
        ("The probe does not show that TTFT falls.", False),
        ("No gain from prefix hits was measured.", False),
        ("It is a potential-overlap signal and not a realised reuse gain of the probe.", False),
        ("The overlap's gain was not measured.", False),
        ("前缀重叠的收益尚未兑现。", False),
        ("探针的重叠不能说明 TTFT 会降低。", False),
        ("命中率 61% 只是信号，没有真实收益。", False),
        ("Never call a probe's figure a gain.", False),
        ("绝不把探针的数字称为收益。", False),
        ("The overlap is a lower bound of nothing.", False),
        ("探针结果是潜在重叠信号，不是真实复用收益。", False),
        ("The overlap is a signal, not a gain.", False),
        ("池变大后 TTFT 降低了 500 ms。", False),
        ("The probe saw 352 tokens. Speed was not looked at.", False),
    ],
)
def test_sentences_that_make_a_gain_of_a_probe(text: str, is_a_gain: bool) -> None:
    assert bool(list(gains_of_a_probe(text))) == is_a_gain
