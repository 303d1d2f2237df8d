"""The names and shapes that the course prints, as it prints them."""

from __future__ import annotations

import inspect

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.prefix_index import Block
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.llm import LLM
from tests.engine.helpers import greedy, make_bench


def test_a_batch_unpacks_as_the_course_prints_it() -> None:
    bench = make_bench()
    bench.engine.add_request([1, 2, 3], greedy(2))
    seqs, is_prefill = bench.scheduler.schedule()
    assert [seq.num_scheduled_tokens for seq in seqs] == [3] and is_prefill is True
    seqs[0].num_scheduled_tokens = 0
    bench.step()
    seqs, is_prefill = bench.scheduler.schedule()
    assert [seq.num_scheduled_tokens for seq in seqs] == [1] and is_prefill is False


def test_postprocess_appends_ends_and_releases() -> None:
    bench = make_bench()
    bench.engine.add_request([1, 2, 3], greedy(9))
    seqs, is_prefill = bench.scheduler.schedule()
    bench.scheduler.kv.commit(seqs[0], 3)
    ended = bench.scheduler.postprocess(seqs, [7], is_prefill, finish_check=lambda seq, token_id: "stop")
    assert ended == seqs and seqs[0].token_ids == [1, 2, 3, 7] and seqs[0].status is SequenceStatus.FINISHED
    assert not bench.manager.used_block_ids and bench.scheduler.is_finished()


def test_a_sequence_holds_what_the_course_names() -> None:
    seq = Sequence(list(range(50)), SamplingParams(), block_size=16)
    assert (seq.status, seq.num_cached_tokens, seq.block_table) == (SequenceStatus.WAITING, 0, [])
    assert (seq.num_blocks, seq.last_block_num_tokens) == (4, 2)  # tutorial 4: 50 tokens in blocks of 16
    seq.append_token(50)
    assert (len(seq), seq.num_prompt_tokens, seq.completion_token_ids) == (51, 50, [50])
    assert seq.block(3) == [48, 49, 50] and seq.last_block_num_tokens == 3


def test_blocks_are_what_the_course_names() -> None:
    block = Block(3)
    assert (block.block_id, block.ref_count, block.hash_value, block.token_ids) == (3, 0, None, ())
    manager = BlockManager(4, 2)
    seq = Sequence([1, 2, 3], SamplingParams(), 2)
    assert manager.can_allocate(seq) is True and len(manager.free_block_ids) == 4
    manager.allocate(seq)
    assert manager.used_block_ids == {0, 1} and seq.block_table == [0, 1]
    manager.hash_blocks(seq, 3)
    assert list(manager.hash_to_block_id.values()) == [0] and manager.blocks[0].token_ids == (1, 2)
    manager.deallocate(seq)
    assert len(manager.free_block_ids) == 4 and not manager.used_block_ids and len(manager.hash_to_block_id) == 1


def test_functions_have_the_names_and_first_arguments_of_the_course() -> None:
    assert list(inspect.signature(LLM.generate).parameters)[1:3] == ["prompts", "sampling_params"]
    assert list(inspect.signature(LLMEngine.add_request).parameters)[1:3] == ["prompt", "sampling_params"]
    assert callable(LLMEngine.step) and callable(LLMEngine.generate) and ModelRunner.execute_model is ModelRunner.run
    assert list(inspect.signature(SamplingParams).parameters)[:3] == ["temperature", "max_tokens", "ignore_eos"]
