"""An exception in one request's stage fails that request alone; three bad steps in a row are told."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import ExecutionError
from tests.engine.fakes import FakeStatePlane, Load
from tests.engine.helpers import Bench, Injected, answer, greedy, make_bench

VOCAB = 16
NUM_REQUESTS, ONE_IN = 60, 50
RANDOM = random.Random(11)
PROMPTS = [[RANDOM.randrange(VOCAB) for _ in range(RANDOM.randrange(3, 30))] for _ in range(NUM_REQUESTS)]
MAX_TOKENS = [RANDOM.randrange(2, 14) for _ in range(NUM_REQUESTS)]

# stage -> (what is wrapped, its method, and whom an exception in there is to hit, from its arguments)
Struck = Callable[..., list[Any]]
STAGES: dict[str, tuple[Callable[[Bench], object], str, Struck]] = {
    "schedule": (lambda bench: bench.scheduler, "schedule", list),
    "forecast": (lambda bench: bench.scheduler.growth, "growth_blocks", lambda seqs: []),
    "match": (lambda bench: bench.scheduler.kv, "match", lambda seq: [seq]),
    "has_room": (lambda bench: bench.scheduler.kv, "has_room", lambda seq, headroom: [seq]),
    "bind": (lambda bench: bench.scheduler.kv, "bind", lambda seq: [seq]),
    "bind, half done": (lambda bench: bench.manager, "allocate", lambda seq: [seq]),
    "grow": (lambda bench: bench.scheduler.kv, "grow", lambda seq: [seq]),
    "forward": (lambda bench: bench.runner, "launch", lambda batch: "batch"),
    "sample": (lambda bench: bench.runner, "collect", lambda handle: "batch"),
    "detokenise": (lambda bench: bench.engine.book, "finish_check", lambda seq, token_id: [seq]),
    "commit": (lambda bench: bench.scheduler.kv, "commit", lambda seq, num_tokens: [seq]),
    "commit, half done": (lambda bench: bench.manager, "hash_blocks", lambda seq, num_tokens: [seq]),
    "emit": (lambda bench: bench.engine.book, "take", lambda seq: [seq]),
    "marks": (lambda bench: bench.engine.marks, "handed_over", lambda seq: []),
    "poll": (lambda bench: bench.scheduler.kv, "poll", list),
}  # fmt: skip
AFTER = {"bind, half done", "commit, half done", "detokenise"}  # raise when the work is done
OFTEN = {"schedule", "forecast", "bind", "bind, half done", "poll"}  # what is called seldom raises once in three calls


class Saboteur:
    """Raises in one stage, one call in `one_in`, and notes whom that must hit."""

    def __init__(self, bench: Bench, stage: str, one_in: int, seed: int = 0) -> None:
        where, name, self._struck = STAGES[stage]
        self.bench, self.num_raised, self.hit = bench, 0, set[str]()
        self._random, self._one_in, self._after = random.Random(f"{stage} {seed}"), one_in, stage in AFTER
        self._real = getattr(where(bench), name)
        self._patch = patch.object(where(bench), name, self._call)

    def __enter__(self) -> Saboteur:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._random.randrange(self._one_in):
            return self._real(*args, **kwargs)
        self.num_raised += 1
        struck = self._struck(*args)
        scheduled = [seq for seq in self.bench.scheduler.running if seq.num_scheduled_tokens]
        self.hit |= {seq.request_id for seq in (scheduled if struck == "batch" else struck)}
        if self._after:
            self._real(*args, **kwargs)
        raise Injected("at 0x7f00deadbeef")


def loaded(**knobs: Any) -> Bench:
    return make_bench(num_blocks=12, vocab_size=VOCAB, max_num_seqs=8, max_prefill_chunk=7, **knobs)


def add_all(bench: Bench) -> list[str]:
    return [
        bench.engine.add_request(prompt, greedy(max_tokens))
        for prompt, max_tokens in zip(PROMPTS, MAX_TOKENS, strict=True)
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_hits_only_those_on_whose_behalf_it_was_raised(stage: str) -> None:
    bench = loaded()
    ids = add_all(bench)
    with Saboteur(bench, stage, 3 if stage in OFTEN else ONE_IN) as saboteur:
        finals = bench.drain()
    assert saboteur.num_raised > 0, "a load under which nothing was raised shows nothing"
    assert set(finals) == set(ids) and bench.engine.is_finished() and not bench.engine.book.request_ids
    assert {request_id for request_id, final in finals.items() if final.error} == saboteur.hit < set(ids)
    for request_id, prompt, max_tokens in zip(ids, PROMPTS, MAX_TOKENS, strict=True):
        final, expected = finals[request_id], answer(prompt, max_tokens, VOCAB)
        if request_id in saboteur.hit:
            assert final.finish_reason == "error" and isinstance(final.error.__cause__, Injected)
            assert "Injected" in str(final.error) and "0x" not in str(final.error)
            assert final.token_ids == expected[: len(final.token_ids)]
        else:
            assert final.finish_reason == "length" and final.token_ids == expected
        if stage != "marks":  # what records the ends is what fails there
            assert bench.terminals(request_id) == ["failed" if final.error else "output_complete"]


def test_a_load_that_cannot_be_taken_in_fails_its_sequence_and_no_other() -> None:
    bench = make_bench(num_blocks=64, vocab_size=VOCAB, kv=lambda device, runner: FakeStatePlane(
        device, lambda seq: Load(delay=2), runner.write))  # fmt: skip
    ids = add_all(bench)
    with Saboteur(bench, "commit", ONE_IN) as saboteur:
        finals = bench.drain()
    assert bench.scheduler.kv.num_loads > 20 and saboteur.num_raised > 0  # type: ignore[attr-defined]
    assert {i for i in ids if finals[i].error} == saboteur.hit
    for request_id, prompt, max_tokens in zip(ids, PROMPTS, MAX_TOKENS, strict=True):
        if request_id not in saboteur.hit:
            assert finals[request_id].token_ids == answer(prompt, max_tokens, VOCAB)


@pytest.mark.parametrize("stage", ["forward", "sample"])
def test_three_bad_steps_in_a_row_are_told_and_a_good_one_ends_the_row(stage: str) -> None:
    bench = make_bench(vocab_size=VOCAB, max_num_seqs=1)
    ids = [bench.engine.add_request(prompt, greedy(4)) for prompt in PROMPTS[:5]]
    with Saboteur(bench, stage, 1):
        for bad in (1, 2, 3):
            assert [out.finish_reason for out in bench.step()] == ["error"]
            assert bench.engine.bad_steps_in_a_row == bad
    bench.step()
    assert bench.engine.bad_steps_in_a_row == 0
    finals = bench.drain()
    assert [finals[i].token_ids for i in ids[3:]] == [answer(p, 4, VOCAB) for p in PROMPTS[3:5]]


def test_what_one_request_causes_is_no_bad_step_and_an_idle_step_is_no_good_one() -> None:
    bench = make_bench(vocab_size=VOCAB)
    bench.engine.add_request(PROMPTS[0], greedy(4))
    with Saboteur(bench, "commit", 1):
        bench.step()
    assert bench.engine.bad_steps_in_a_row == 0
    bench.engine.add_request(PROMPTS[1], greedy(4))
    with Saboteur(bench, "forward", 1):
        bench.step()
    assert bench.step() == [] and bench.engine.bad_steps_in_a_row == 1


def test_a_bad_step_is_counted_once_and_loses_no_command() -> None:
    bench, done = make_bench(vocab_size=VOCAB), []
    request_id = bench.engine.add_request(PROMPTS[0], greedy(4))

    def fail() -> None:
        raise Injected

    for command in (fail, lambda: done.append(1), fail, lambda: done.append(2)):
        bench.engine.post(command)
    bench.step()
    assert done == [1, 2] and bench.engine.bad_steps_in_a_row == 1
    assert bench.drain()[request_id].token_ids == answer(PROMPTS[0], 4, VOCAB)


def test_a_schedule_that_fails_once_does_not_take_the_head_for_one_that_never_fits() -> None:
    bench = make_bench(vocab_size=VOCAB)
    request_id = bench.engine.add_request(PROMPTS[0], greedy(4))
    with Saboteur(bench, "schedule", 1):
        assert bench.step() == [] and bench.engine.bad_steps_in_a_row == 1
    assert bench.drain()[request_id].token_ids == answer(PROMPTS[0], 4, VOCAB)


def test_who_listens_to_an_engine_that_can_schedule_nothing_is_told() -> None:
    bench = make_bench(vocab_size=VOCAB)
    with Saboteur(bench, "schedule", 1), pytest.raises(ExecutionError, match="at schedule: Injected"):
        bench.engine.generate([{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1]}])
    assert not bench.engine.book.request_ids and bench.scheduler.is_finished()


@pytest.mark.parametrize("stage", ["forward", "emit", "detokenise"])
def test_a_listener_hears_of_the_failure_of_its_request(stage: str) -> None:
    bench = make_bench(vocab_size=VOCAB)
    with Saboteur(bench, stage, 1):
        (output,) = bench.engine.generate([{"prompt": PROMPTS[0]}])
    assert output.finish_reason == "error" and isinstance(output.error, ExecutionError)


@pytest.mark.parametrize("place", ["encode", "add", "second sample"])
def test_a_request_that_fails_on_its_way_in_leaves_the_books_as_they_were(place: str) -> None:
    bench = make_bench(vocab_size=VOCAB)
    bystander = bench.engine.add_request(PROMPTS[0], greedy(4))
    real, calls = bench.scheduler.add, []

    def add(seq: Any) -> None:
        calls.append(seq)
        if len(calls) == (2 if place == "second sample" else 1):
            raise Injected
        real(seq)

    target = (bench.engine.intake.tokenizer, "encode") if place == "encode" else (bench.scheduler, "add")
    with patch.object(*target, add), pytest.raises(ExecutionError, match="at intake: Injected"):
        bench.engine.add_request("text", SamplingParams(n=3), request_id="mine")
    assert bench.engine.book.request_ids == [bystander] and len(bench.scheduler.live()) == 1
    assert bench.terminals("mine") == ["rejected"]
    bench.engine.add_request("text", SamplingParams(n=3), request_id="mine")
    assert bench.drain()[bystander].token_ids == answer(PROMPTS[0], 4, VOCAB)


def test_a_result_with_too_few_rows_fails_its_batch_instead_of_shifting_it() -> None:
    bench = make_bench(vocab_size=VOCAB)
    for prompt in PROMPTS[:3]:
        bench.engine.add_request(prompt, greedy(4))
    real = bench.runner.collect

    def short(handle: Any) -> Any:
        result = real(handle)
        return type(result)(result.token_ids[:-1], result.logprobs[:-1])

    with patch.object(bench.runner, "collect", short):
        outputs = bench.step()
    assert [out.finish_reason for out in outputs] == ["error"] * 3 and bench.engine.bad_steps_in_a_row == 1
