"""kernels.c: when it is compiled, where it lies, what happens without a compiler; and that neighbours change no bit."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ConfigError
from nanovllm.kernels import c_library
from nanovllm.kernels.c_library import CompileError
from nanovllm.kernels.compiled import CompiledKernels
from nanovllm.kernels.cpu import CpuKernels
from nanovllm.kernels.interface import StepLayout
from nanovllm.kernels.selection import choose_kernels
from tests.kernels.test_parity import Step, steps

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing was compiled yet, and a source of the same names that compiles at once."""
    source = tmp_path / "kernels.c"
    source.write_text("".join(f"void {name}(void) {{}} " for name in c_library.NAMES))
    monkeypatch.setattr(c_library, "SOURCES", (source,))
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_compiled_once_and_kept_private(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        c_library.load(torch.float32)
        c_library.load(torch.float32)
    assert caplog.text.count("Compiling") == 1  # the progress line
    (library,) = cache.iterdir()
    assert library.name.startswith("float32-") and cache.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "script, says",
    [
        ("echo out of tea >&2; exit 1", "out of tea"),
        ("exit 0", "failed"),  # success without a result
    ],
)
def test_a_compiler_that_fails_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    """`auto` goes on with torch and says so; a set that was named is refused, with what helps."""
    monkeypatch.setenv("CC", fake_compiler(tmp_path, script))
    assert choose_kernels("auto", CPU).name == "cpu"
    with pytest.raises(ConfigError, match=says) as refused:
        choose_kernels("compiled", CPU)
    assert refused.value.param == "kernels" and "compiler" in str(refused.value.hint)
    assert not list(cache.iterdir())


def test_a_disk_that_takes_nothing_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(c_library.os, "replace", is_full)
    assert choose_kernels("auto", CPU).name == "cpu"
    with pytest.raises(ConfigError, match="No space left"):
        choose_kernels("compiled", CPU)
    assert not list(cache.iterdir())


def test_a_command_that_is_none_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc '")
    assert choose_kernels("auto", CPU).name == "cpu"
    with pytest.raises(CompileError, match="is no command"):
        c_library.load(torch.float32)


def test_after_a_compiler_that_is_too_old_comes_the_next(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once, not at each start: what the next one made lies there."""
    fake_compiler(tmp_path, f"echo >> {tmp_path}/asked; echo bad value for -march >&2; exit 1")
    old, new = [str(tmp_path / "compiler")], c_library.compilers()[0]
    monkeypatch.setattr(c_library, "compilers", lambda: [old, new])
    for _ in range(2):
        c_library.load(torch.float32)
    assert (tmp_path / "asked").read_text() == "\n"
    monkeypatch.setattr(c_library, "compilers", lambda: [old, ["sh", *old]])
    with pytest.raises(CompileError, match=r"bad value.*; .*bad value"):
        c_library.load(torch.float32)


def test_without_a_compiler_the_engine_answers_and_says_which_kernels(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler")
    with caplog.at_level(logging.INFO, "nanovllm"), LLM("tiny:random", num_blocks=16) as llm:
        assert llm.generate(["a"], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids
    assert "torch operations only" in caplog.text and "/no/such/compiler" in caplog.text


def test_nothing_that_others_may_write_is_loaded(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(CompileError, match="written by others"):
        c_library.load(torch.float32)
    cache.chmod(0o700)
    c_library.load(torch.float32)
    next(cache.iterdir()).chmod(0o722)
    with pytest.raises(CompileError, match="written by others"):
        c_library.load(torch.float32)


def test_a_file_that_is_no_library_is_a_reason_and_does_not_stay(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", fake_compiler(tmp_path, 'for last; do :; done; echo nothing > "$last"'))
    with pytest.raises(CompileError, match="cannot be loaded"):
        c_library.load(torch.bfloat16)
    assert not list(cache.iterdir())  # the next start tries again


def test_reference_and_cpu_need_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert choose_kernels("reference", CPU).name == "reference" and type(choose_kernels("cpu", CPU)) is CpuKernels
    assert not cache.exists()


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_alone_beside_others_and_with_two_threads_are_the_same_bits(step: Step) -> None:
    """Each sequence's sums have an order of their own: nothing of the step or of the threads is in it."""
    if step.head_dim % 16:
        return
    kernels, pool = CompiledKernels(), step.pool(torch.float32)
    layout, parts = step.layout(), step.qkv(torch.float32)

    def attend(part: StepLayout, span: slice) -> torch.Tensor:
        plan = kernels.plan(part, pool.clone(), step.geometry)
        return kernels.attention(plan, 1, *(tensor[span].clone() for tensor in parts))

    together, start = attend(layout, slice(None)), 0
    torch.set_num_threads(2)
    try:
        assert torch.equal(attend(layout, slice(None)), together)
    finally:
        torch.set_num_threads(1)
    for i, length in enumerate(step.queries):
        own, span = slice(i, i + 1), slice(start, start + length)
        alone = StepLayout(
            layout.positions[span], layout.query_lens[own], layout.context_lens[own], layout.block_tables[own],
            layout.slot_blocks[span], layout.slot_offsets[span],
        )  # fmt: skip
        assert torch.equal(attend(alone, span), together[span])
        start += length


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the cap is one of x86")
@pytest.mark.parametrize("cap, level", [("avx2", "v3"), ("default", "v2")])
def test_the_cap_of_torch_caps_our_kernels_too(cap: str, level: str) -> None:
    """Read in a process of its own: torch looks at the variable once."""
    done = subprocess.run(
        [sys.executable, "-c", "from nanovllm.kernels.c_library import target; print(*target(['cc']))"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": cap, "CC": "cc"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [f"-march=x86-64-{level}"]


def test_each_set_of_instructions_is_a_file_of_its_own(cache: Path) -> None:
    for instructions in ([], ["-O1"], []):
        c_library.load(torch.float32, instructions)
    assert len(list(cache.iterdir())) == 2


def test_the_name_of_what_is_compiled_holds_the_processor(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-mcpu=native is another instruction set elsewhere: a folder that moved with its user must not be used there."""
    monkeypatch.setattr(c_library, "processor", lambda: ["CPU part : 0xd40"])
    c_library.load(torch.float32)
    monkeypatch.setattr(c_library, "processor", lambda: ["CPU part : 0xd0c"])
    c_library.load(torch.float32)
    assert len(list(cache.iterdir())) == 2


SMALL_STACK = """
import threading
from nanovllm import LLM, SamplingParams
with LLM("tiny:random", num_blocks=64, kernels="compiled", num_threads=2) as llm:
    run = lambda: print(len(llm.generate([list(range(1, 200))], SamplingParams(max_tokens=2, ignore_eos=True))))
    threading.stack_size(512 * 1024)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""


def test_a_prompt_needs_no_large_stack() -> None:
    """Regression: a tile of queries lay on the stack, a megabyte, and a thread that had less crashed."""
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["1"]), done.stderr
