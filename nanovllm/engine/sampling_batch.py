"""SamplingBatch: how the M sampling rows of one step choose their tokens, as plain arrays.

What it is: SamplingParams of many sequences, column by column, and the tokens that
penalties look at. What it knows nothing about: logits and torch. Invariant: a row
depends on its own sequence only, so a batch of one samples as a batch of sixty-four.
Ragged columns are (values, offsets): row i owns values[offsets[i]:offsets[i + 1]].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.engine.grammar import Mask
from nanovllm.engine.sequence import Sequence

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SamplingBatch:
    """Columns of length M; ragged ones carry their offsets of length M + 1."""

    temperature: Floats
    top_k: Ints  # 0: off
    top_p: Floats
    min_p: Floats
    repetition_penalty: Floats
    presence_penalty: Floats
    frequency_penalty: Floats
    seeds: NDArray[np.uint64]
    positions: Ints  # index of the token to be sampled: with the seed, the noise's counter
    num_logprobs: Ints  # -1: none
    history: Ints  # tokens so far of the rows that have penalties
    history_offsets: Ints
    prompt_lens: Ints  # how much of a row's history is prompt
    banned: Ints  # tokens that must not be chosen now: ends, before min_tokens is reached
    banned_offsets: Ints
    bias_ids: Ints
    bias_values: Floats
    bias_offsets: Ints
    mask_rows: Ints  # [G]: the rows whose grammar allows some tokens only
    masks: Mask  # [G, ceil(vocab / 32)]: bit i % 32 of word i // 32 is set where token i is allowed

    @property
    def all_greedy(self) -> bool:
        """True where every row takes the most likely token."""
        return bool((self.temperature == 0).all())

    @property
    def changes_logits(self) -> bool:
        """True where a grammar, penalties, biases or bans apply to some row."""
        return bool(self.history.size or self.banned.size or self.bias_ids.size or self.mask_rows.size)

    @classmethod
    def build(cls, seqs: list[Sequence], masks: Mapping[Sequence, Mask] | None = None) -> SamplingBatch:
        """The columns of `seqs`, in order; `masks` of those with a grammar."""
        masks = masks or {}
        mask_rows = [row for row, seq in enumerate(seqs) if seq in masks]
        params = [s.sampling_params for s in seqs]
        history, history_offsets = _ragged([s.token_ids if s.sampling_params.has_penalties else () for s in seqs])
        banned, banned_offsets = _ragged([_banned(s) for s in seqs])
        bias_ids, bias_offsets = _ragged([tuple(p.logit_bias) for p in params])
        bias_values = list(chain.from_iterable(p.logit_bias.values() for p in params))
        return cls(
            temperature=_floats(params, lambda p: 0.0 if p.is_greedy else p.temperature),
            top_k=np.array([max(p.top_k, 0) for p in params], np.int64),
            top_p=_floats(params, lambda p: p.top_p),
            min_p=_floats(params, lambda p: p.min_p),
            repetition_penalty=_floats(params, lambda p: p.repetition_penalty),
            presence_penalty=_floats(params, lambda p: p.presence_penalty),
            frequency_penalty=_floats(params, lambda p: p.frequency_penalty),
            seeds=np.array([s.seed for s in seqs], np.uint64),
            positions=np.array([s.num_tokens for s in seqs], np.int64),
            num_logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in params], np.int64),
            history=history,
            history_offsets=history_offsets,
            prompt_lens=np.array([s.num_prompt_tokens for s in seqs], np.int64),
            banned=banned,
            banned_offsets=banned_offsets,
            bias_ids=bias_ids,
            bias_values=np.array(bias_values, np.float32),
            bias_offsets=bias_offsets,
            mask_rows=np.array(mask_rows, np.int64),
            masks=np.stack([masks[seqs[row]] for row in mask_rows]) if mask_rows else np.zeros((0, 0), np.uint32),
        )


def _banned(seq: Sequence) -> tuple[int, ...]:
    """Before min_tokens is reached, nothing that would end the sequence may be chosen."""
    if seq.num_completion_tokens >= seq.sampling_params.min_tokens:
        return ()
    return (*seq.eos_token_ids, *seq.sampling_params.stop_token_ids)


def _floats(params: list[SamplingParams], read: Callable[[SamplingParams], float]) -> Floats:
    return np.array([read(p) for p in params], np.float32)


def _ragged(rows: list[tuple[int, ...] | list[int]]) -> tuple[Ints, Ints]:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(rows), np.int64, int(offsets[-1])), offsets
