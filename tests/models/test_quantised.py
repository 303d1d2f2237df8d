"""Linears in 8-bit groups: how far they are from the weights, who computes with them, and whose KV theirs is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from model_files import write_gguf

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.build import weight_bytes
from nanovllm.errors import ConfigError, OutOfMemoryError
from nanovllm.kernels.compiled import CompiledKernels
from nanovllm.kernels.grouped_linear import GroupedLinear
from nanovllm.kernels.grouped_weight import GROUP, GroupedWeight
from nanovllm.kernels.reference import ReferenceKernels
from nanovllm.models.loading import load_model_files, tiny_config
from nanovllm.models.quantised import EMBEDDING, HEAD, in_eight_bits

DOWN = "model.layers.0.mlp.down_proj.weight"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda n: n * GROUP)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(max_examples=80, deadline=None)
@given(weight=WEIGHTS)
def test_a_weight_is_off_by_half_a_scale_at_most(weight: np.ndarray) -> None:
    made = GroupedWeight.quantised(torch.from_numpy(weight))
    assert made.bits == 8 and made.codes.dtype == np.uint8 and made.codes.shape == weight.shape
    largest = np.abs(weight).reshape(len(weight), -1, GROUP).max(axis=2)
    bound = made.scales * 0.5 + largest * 1e-6 + 1e-35  # float32's rounding of offset, scale and sum
    off = np.abs(made.restored().numpy().astype(np.float64) - weight)
    assert (off <= np.repeat(bound, GROUP, axis=1)).all()


def test_one_value_is_itself_and_so_are_the_sixteen_of_a_4_bit_group() -> None:
    for weight in (torch.full((2, GROUP), 0.3), (torch.arange(4 * GROUP) % 16 * 0.1 - 0.7).view(2, -1)):
        torch.testing.assert_close(GroupedWeight.quantised(weight).restored(), weight, rtol=1e-6, atol=1e-6)


def test_a_model_gives_the_weights_its_codes_stand_for() -> None:
    plain = load_model_files("tiny:random")
    model = in_eight_bits(load_model_files("tiny:random"))
    for name in (DOWN, HEAD, "model.layers.1.self_attn.q_proj.weight"):
        groups = model.weights.grouped(name)
        assert groups is not None and groups.bits == 8
        assert torch.equal(model.weights.get(name), groups.restored())
        torch.testing.assert_close(model.weights.get(name), plain.weights.get(name), rtol=0, atol=0.01)
    for name in (EMBEDDING, "model.norm.weight"):
        assert model.weights.grouped(name) is None
        assert torch.equal(model.weights.get(name), plain.weights.get(name))
    assert model.weights.fingerprint() != plain.weights.fingerprint()
    assert str(model.weights) == "3 weights quantised, 0 as the file has them"


def test_a_head_that_is_the_embedding_becomes_a_weight_of_its_own(tmp_path: Path) -> None:
    plain = load_model_files(str(tied_gguf(tmp_path)))
    model = in_eight_bits(load_model_files(str(tied_gguf(tmp_path))))
    assert plain.config.tie_word_embeddings and not model.config.tie_word_embeddings
    assert HEAD in model.weights.names() and model.weights.shape(HEAD) == plain.weights.shape(EMBEDDING)
    assert torch.equal(model.weights.get(EMBEDDING), plain.weights.get(EMBEDDING))
    assert not torch.equal(model.weights.get(HEAD), plain.weights.get(EMBEDDING))
    torch.testing.assert_close(model.weights.get(HEAD), plain.weights.get(EMBEDDING), rtol=0, atol=0.02)


def test_a_files_own_groups_stay(smollm2_path: Path) -> None:
    plain, model = load_model_files(str(smollm2_path)), in_eight_bits(load_model_files(str(smollm2_path)))
    own, kept = plain.weights.grouped(DOWN), model.weights.grouped(DOWN)
    assert own is not None and kept is not None and kept.bits == own.bits == 4
    assert np.array_equal(own.codes, kept.codes) and str(model.weights).endswith("1 as the file has them")
    plain.weights.close()
    model.weights.close()


def test_inputs_that_are_no_whole_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = replace(tiny_config("llama"), intermediate_size=100)
    monkeypatch.setattr("nanovllm.models.loading.tiny_config", lambda kind: odd)
    with pytest.raises(ConfigError, match=r"multiples of 32; .* 100 inputs") as caught:
        LLM("tiny:random", quantization="int8")
    assert caught.value.param == "quantization" and caught.value.hint


@pytest.mark.parametrize("value", ["int4", "", 8, True])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="quantization must be one of int8, not"):
        EngineConfig("tiny:random", quantization=value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_set_computes_with_the_same_weights(dtype: str) -> None:
    answers, prompt = [], list(range(40, 60))
    for kernels in ("reference", "cpu", "auto"):
        with LLM("tiny:random", dtype=dtype, kernels=kernels, quantization="int8", num_blocks=16) as llm:
            answers.append(llm.generate([prompt], GREEDY)[0])
            model: Any = llm.engine.runner.model  # type: ignore[attr-defined]
            reads = model.kernels.reads_groups(model.embedding.dtype)
            assert isinstance(model.layers[0].qkv, GroupedLinear) == reads
            assert not reads or (dtype == "bfloat16" and isinstance(model.kernels, CompiledKernels))
    first = [answer.completions[0].logprobs[0][0][1] for answer in answers]
    assert first == pytest.approx([first[0]] * 3, abs={"bfloat16": 0.1, "float32": 1e-3}[dtype])
    assert dtype == "bfloat16" or len({tuple(answer.token_ids) for answer in answers}) == 1


def test_it_says_what_it_did_and_where_it_saves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"), LLM("tiny:random", dtype="float32", quantization="int8") as llm:
        identity = llm.engine.parts.identity
    assert "quantization int8: 15 weights quantised, 0 as the file has them" in caplog.text
    assert "makes nothing faster here" in caplog.text
    with LLM("tiny:random", dtype="float32") as plain:
        assert plain.engine.parts.identity["weights"] != identity["weights"]


def test_kv_made_with_other_weights_is_not_found(tmp_path: Path) -> None:
    prompt, how = list(range(60)), {"dtype": "float32", "num_blocks": 32, "state_dir": str(tmp_path)}
    cached = []
    for quantization in (None, "int8", "int8"):
        with LLM("tiny:random", quantization=quantization, state_load="always", **how) as llm:
            cached.append(llm.generate([prompt], GREEDY)[0].cached_tokens)
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_memory_counts_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied, compiled = load_model_files(str(tied_gguf(tmp_path))), CompiledKernels()
    quantised = in_eight_bits(load_model_files("tiny:random"))
    lookup = tied.config.vocab_size * tied.config.hidden_size
    assert weight_bytes(tied, ReferenceKernels(), torch.float32) == 4 * tied.config.parameter_count()
    assert weight_bytes(tied, compiled, torch.float32) == 4 * (tied.config.parameter_count() + lookup)
    linears = quantised.config.parameter_count() - lookup
    groups = linears * 1.25 if compiled.reads_groups(torch.bfloat16) else 0
    assert weight_bytes(quantised, compiled, torch.bfloat16) == 2 * quantised.config.parameter_count() + int(groups)
    monkeypatch.setattr("nanovllm.engine.build.free_memory", lambda *_: 10_000)
    with pytest.raises(OutOfMemoryError, match="estimated"):
        LLM("tiny:random")


def tied_gguf(folder: Path) -> Path:
    path = folder / "tied.gguf"
    if not path.exists():
        write_gguf(path, replace(tiny_config("llama"), tie_word_embeddings=True))
    return path
