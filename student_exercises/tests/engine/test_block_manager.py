"""The four bodies of the block manager, by hand. 块管理器的四个函数体，手算可验。

    python -m pytest student_exercises/tests

Blocks hold 4 tokens. 每块 4 个 token。
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.sequence import Sequence

FILE = Path(__file__).resolve().parents[2] / "nanovllm/engine/block_manager.py"


def manager(num_blocks: int, prefix_mode: str = "reuse") -> Any:
    """The BlockManager of this folder, not the installed one. 本目录的 BlockManager，不是已安装的。"""
    spec = importlib.util.spec_from_file_location("student_block_manager", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.BlockManager(num_blocks, 4, prefix_mode=prefix_mode)


def sequence(tokens: list[int]) -> Sequence:
    """A request of these prompt tokens. 一个请求。"""
    return Sequence(tokens, SamplingParams(), 4)


def test_given_a_fresh_pool_is_free() -> None:
    """Given, not to be written. 已给出。"""
    blocks = manager(3)
    assert len(blocks.free_block_ids) == 3 and not blocks.used_block_ids


def test_can_allocate() -> None:
    """9 tokens need 3 blocks; with one left over, 4. 9 个 token 要 3 块；再留一块则要 4 块。"""
    seq = sequence([1] * 9)
    assert manager(3).can_allocate(seq) is True and manager(2).can_allocate(seq) is False
    assert manager(4).can_allocate(seq, headroom=1) is True and manager(3).can_allocate(seq, headroom=1) is False


def test_allocate() -> None:
    """Free and used are all blocks; each of the table has one holder. 空闲与在用之和为全部；表中每块有一个持有者。"""
    blocks, seq = manager(5), sequence([1] * 9)
    blocks.allocate(seq)
    assert len(set(seq.block_table)) == 3 and blocks.used_block_ids == set(seq.block_table)
    assert len(blocks.free_block_ids) == 2 and seq.num_cached_tokens == 0
    assert [blocks.blocks[i].ref_count for i in seq.block_table] == [1, 1, 1]


def test_deallocate() -> None:
    """Everything is back, and the sequence holds nothing. 全部归还，序列不再持有任何东西。"""
    blocks, seq = manager(5), sequence([1] * 9)
    blocks.allocate(seq)
    blocks.deallocate(seq)
    assert len(blocks.free_block_ids) == 5 and not blocks.used_block_ids
    assert seq.block_table == [] and seq.num_cached_tokens == 0


def test_hash_blocks() -> None:
    """Full blocks can be found by their tokens, and are shared; a half empty one is not. 满块可被找到并共享。"""
    blocks, first, second = manager(8), sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]), sequence([1, 2, 3, 4, 5, 6, 7, 8, 10])
    blocks.allocate(first)
    blocks.hash_blocks(first, 9)
    assert len(blocks.hash_to_block_id) == 2
    blocks.allocate(second)
    assert second.block_table[:2] == first.block_table[:2] and second.block_table[2] != first.block_table[2]
    assert second.num_cached_tokens == 8 and blocks.blocks[first.block_table[0]].ref_count == 2
    blocks.deallocate(first)
    assert blocks.blocks[second.block_table[0]].ref_count == 1 and len(blocks.used_block_ids) == 3


def test_hash_blocks_publishes_nothing_with_prefix_mode_off() -> None:
    """`off` shares nothing. `off` 不共享。"""
    blocks, seq = manager(4, "off"), sequence([1] * 8)
    blocks.allocate(seq)
    blocks.hash_blocks(seq, 8)
    assert not blocks.hash_to_block_id
