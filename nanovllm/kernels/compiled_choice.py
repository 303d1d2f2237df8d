"""The choice of tokens as one call: choice.c over the rows of a step.

What it is: the columns of a batch as the call takes them. What it knows nothing about: sequences, what the columns are
for. Invariants: the meaning is that of engine/sampler.py in torch, which stands beside it where there is no compiler;
a row's token depends on its own row only.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm.kernels.c_library import ADDRESS, COUNT
from nanovllm.kernels.team import Team


class ChoiceArgs(ctypes.Structure):
    """`choice_args` of choice.c, field by field."""

    _fields_ = (
        ("logits", ADDRESS),
        *((name, COUNT) for name in ("rows", "vocab")),
        *((name, ADDRESS) for name in ("temperature", "reach", "top_p", "top_k", "noise", "tokens")),
    )


class CompiledChoice:
    """Chooses for many rows at once, in a team's threads."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def __call__(
        self,
        logits: torch.Tensor,
        temperature: NDArray[np.float32],
        min_p: NDArray[np.float32],
        top_p: NDArray[np.float32],
        top_k: NDArray[np.int64],
        noise: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """One token for each row of `logits` [M, vocab], float32, which are used up; -1 where none is finite."""
        logits = logits.contiguous()
        tokens = np.empty(len(logits), np.int64)
        floats = [np.ascontiguousarray(x, np.float32) for x in (temperature, _reach(min_p, temperature), top_p)]
        columns: list[NDArray[Any]] = [
            *floats,
            np.ascontiguousarray(top_k, np.int64),
            np.ascontiguousarray(noise, np.float64),
            tokens,
        ]
        args = ChoiceArgs(logits.data_ptr(), *logits.shape, *(column.ctypes.data for column in columns))
        self._team.library.choose_tokens(ctypes.byref(args), self._team.address, self._team.threads)
        return tokens


def _reach(min_p: NDArray[np.float32], temperature: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far below the largest logit min-p looks: without it, everywhere."""
    reach, some = np.full(len(min_p), np.inf, np.float32), min_p > 0
    reach[some] = -np.log(min_p[some]) * temperature[some]
    return reach
