"""The floor of a decode step: it counts the engine's own products, and a slow linear of ours cannot lower the ratio."""

from __future__ import annotations

from argparse import Namespace

import pytest
import roofline
import torch

from nanovllm import LLM

ARGS = Namespace(model="tiny:random", dtype="float32", context=8, repeats=2)


def test_every_path_computes_the_engines_own_products() -> None:
    with LLM("tiny:random", dtype="float32", max_model_len=64) as llm:
        model = llm.engine.runner.model
        ours = [linear for layer in model.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        paths = roofline.linear_paths("tiny:random", model.config, torch.float32, rows=3)
        assert set(paths) == {"torch", "packed"}
        for path in paths.values():
            for i, (linear, own) in enumerate(zip(path, [*ours, model.head], strict=True)):
                x = torch.randn(3, roofline.widths(model.config)[i])
                torch.testing.assert_close(linear(x), own(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bare_call_computes_what_the_linear_does(rows: int) -> None:
    with LLM("smollm2", dtype="bfloat16", num_blocks=16, max_model_len=64) as llm:
        model = llm.engine.runner.model
        if model.whole is None:
            pytest.skip("steps are not one call on this processor")
        library = model.whole._team.library
        for linear, width in zip((model.layers[0].qkv, model.head), (576, 576), strict=True):
            x = torch.randn(rows, width).bfloat16()
            expected = linear(x)
            found = torch.zeros_like(expected)
            function, args = roofline.bare_call(linear, x, found, library)
            function(args, None, 1)
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("own_s", "fastest", "ratio"), [(0.009, "packed", 2.5), (0.002, "ours", 5.0)])
def test_the_fastest_path_makes_the_floor(
    monkeypatch: pytest.MonkeyPatch, own_s: float, fastest: str, ratio: float
) -> None:
    times = {"step": 0.01, "torch": 0.005, "packed": 0.004, "ours": own_s}
    monkeypatch.setattr(roofline, "in_turn", lambda passes, repeats: times | dict.fromkeys(passes.keys() - times))
    row = roofline.measure(ARGS, 2, bandwidth=1e18)
    assert (row["fastest"], row["ratio"]) == (fastest, ratio)


def test_a_real_measurement_counts_the_kv_of_the_step() -> None:
    row = roofline.measure(ARGS, 2, bandwidth=1e6)
    assert row["step_ms"] > 0
    assert set(row["paths_ms"]) == {"torch", "packed", "ours"}
    bytes_a_token = 2 * 2 * 2 * 16 * 4  # k and v, layers, KV heads, head size, float32
    assert 2 * 8 * bytes_a_token / 1e6 * 1e3 < row["kv_ms"] < 2 * 32 * bytes_a_token / 1e6 * 1e3
