"""A fresh engine around a loaded model: the same tokens, a pool of its own, and nothing left from the run before."""

from __future__ import annotations

from nanovllm import LLM
from nanovllm.engine.run_header import run_header
from nanovllm.lab.fresh_engine import fresh_engine
from nanovllm.lab.workload_run import run_workload
from nanovllm.lab.workloads import generate


def test_it_is_cold_and_bounded_and_computes_the_same() -> None:
    workload = generate("short_ctx", sessions=4, length=20, output_len=5, shared_len=16)
    with LLM("tiny:random", num_blocks=64, progress=False) as llm:
        whole = run_workload(llm.engine, workload)
        assert run_header(llm.engine, llm.config, "").prior_state == "warm"
        engine = fresh_engine(llm.engine, llm.config, 5)
        header = run_header(engine, llm.config, "")
        assert (header.num_blocks, header.prior_state) == (5, "cold") and engine.intake.max_model_len == 80
        small = run_workload(engine, workload)
        tokens = [{i: final.token_ids for i, final in run.finals.items()} for run in (whole, small)]
        assert tokens[0] == tokens[1]
        assert run_header(fresh_engine(llm.engine, llm.config, 64), llm.config, "").prior_state == "cold"
