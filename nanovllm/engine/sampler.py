"""Sampler: logits [M, vocab] and a SamplingBatch in, M tokens out.

What it is: penalties, filters and the choice. What it knows nothing about:
sequences, KV, text. Order, as vLLM's: grammar -> bans (min_tokens) -> logit bias ->
penalties -> temperature -> min-p -> top-k -> top-p -> choice. Reported log-probabilities are
those of the model's own logits, before any of it.

Noise comes from a counter generator: one uniform per (seed, position), mixed by
splitmix64 (Steele et al., 2014). A row's choice depends on its own logits, seed and
position only, so it survives batching, preemption and hand-over. The token is found
in vocabulary order on the cumulative distribution: order by probability would let
rounding swap two near-equal tokens.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from nanovllm.engine.exec_batch import NO_TOKEN, ExecResult
from nanovllm.engine.sampling_batch import SamplingBatch
from nanovllm.kernels.interface import Choice

SPAN = 64  # tokens whose probabilities are summed together when the drawn one is looked for
DRAWN_TOGETHER = 16  # rows: what a draw writes then stays in the processor's cache, and its memory is used again
TOP_CANDIDATES = 1024  # top-p looks at this many tokens first and sorts the whole vocabulary only if it must
MASK = float("-inf")


class Sampler:
    """Stateless: everything a choice depends on is in its arguments. `choice`, where there is one, replaces torch's."""

    def __init__(self, choice: Choice | None = None) -> None:
        self._choice = choice

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> ExecResult:
        """Choose one token per row of `logits` [M, vocab], any float dtype; a `choice` uses them up."""
        raw = logits.float()
        logprobs = _top_logprobs(raw, batch) if (batch.num_logprobs >= 0).any() else None
        adjusted = _adjust(raw.clone(), batch) if batch.changes_logits else raw
        token_ids = _choose(adjusted, batch) if self._choice is None else _call(self._choice, adjusted, batch)
        if logprobs is None:
            return ExecResult(token_ids, [None] * len(token_ids))
        return ExecResult(token_ids, [_chosen_first(row, int(t)) for row, t in zip(logprobs, token_ids, strict=True)])


def _call(choice: Choice, logits: torch.Tensor, batch: SamplingBatch) -> NDArray[np.int64]:
    noise = np.zeros(len(logits)) if batch.all_greedy else uniforms(batch.seeds, batch.positions)
    return choice(logits, batch.temperature, batch.min_p, batch.top_p, batch.top_k, noise)


def _choose(logits: torch.Tensor, batch: SamplingBatch) -> NDArray[np.int64]:
    """The choice in torch: one token per row, NO_TOKEN where there is no finite logit."""
    highest, tokens = _highest(logits)
    if not batch.all_greedy:
        drawn = np.flatnonzero(batch.temperature > 0)
        for rows in np.split(drawn, range(DRAWN_TOGETHER, len(drawn), DRAWN_TOGETHER)):
            tokens[torch.from_numpy(rows).to(tokens.device)] = _draw(logits, batch, rows)
    found: NDArray[np.int64] = tokens.masked_fill_(~highest.isfinite(), NO_TOKEN).cpu().numpy()
    return found


def _highest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, NaN where it has one, and its first place."""
    if logits.device.type != "cpu" or not logits.numel():
        highest, tokens = logits.max(dim=-1)
        return highest, tokens
    tokens = torch.from_numpy(logits.numpy().argmax(axis=-1))  # vectorised, unlike torch's, and in this thread
    return logits.gather(1, tokens[:, None])[:, 0], tokens


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One uniform in [0, 1) per row, a pure function of (seed, position)."""
    with np.errstate(over="ignore"):
        mixed = _splitmix64(_splitmix64(seeds) + positions.astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _adjust(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Grammars, then bans, biases and penalties, each for all rows at once. Changes `logits` in place."""
    if batch.mask_rows.size:
        _forbid(logits, batch)
    flat, vocab = logits.view(-1), logits.shape[1]
    if batch.banned.size:
        flat[_cells(batch.banned, batch.banned_offsets, vocab, flat)] = MASK
    if batch.bias_ids.size:
        cells = _cells(batch.bias_ids, batch.bias_offsets, vocab, flat)
        flat[cells] += torch.from_numpy(batch.bias_values).to(flat)
    if batch.history.size:
        _penalise(flat, vocab, batch)
    return logits


def _rows(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row that owns each value of a ragged column."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _cells(token_ids: NDArray[np.int64], offsets: NDArray[np.int64], vocab: int, flat: torch.Tensor) -> torch.Tensor:
    """Where the tokens of a ragged column stand in all rows' logits, laid end to end."""
    return torch.from_numpy(_rows(offsets) * vocab + token_ids).to(flat.device)


def _forbid(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Mask what a row's grammar does not allow; tokens beyond the masks' width are not allowed."""
    bits = np.unpackbits(batch.masks.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(bits == 0).to(logits.device)
    rows = torch.from_numpy(batch.mask_rows).to(logits.device)
    logits[rows] = logits[rows].masked_fill_(forbidden, MASK)


def _penalise(flat: torch.Tensor, vocab: int, batch: SamplingBatch) -> None:
    """Repetition over prompt and output (CTRL, arXiv 1909.05858); presence and frequency over output (OpenAI)."""
    rows = _rows(batch.history_offsets)
    cells = rows * vocab + batch.history
    if (batch.repetition_penalty != 1).any():
        seen, factors = (
            torch.from_numpy(cells).to(flat.device),
            torch.from_numpy(batch.repetition_penalty[rows]).to(flat),
        )
        values = flat[seen]
        flat[seen] = torch.where(values > 0, values / factors, values * factors)  # twice the same, where seen twice
    is_output = np.arange(len(cells)) - batch.history_offsets[rows] >= batch.prompt_lens[rows]
    output, counts = np.unique(cells[is_output], return_counts=True)
    owner = output // vocab
    penalty = batch.presence_penalty[owner] + batch.frequency_penalty[owner] * counts.astype(np.float32)
    flat[torch.from_numpy(output).to(flat.device)] -= torch.from_numpy(penalty).to(flat)


def _draw(logits: torch.Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> torch.Tensor:
    """Filter and draw for the rows with a temperature. Returns [len(rows)] token ids."""
    temperature = torch.from_numpy(batch.temperature[rows]).to(logits.device)
    drawn = logits[torch.from_numpy(rows).to(logits.device)]
    scaled = (drawn - drawn.amax(dim=-1, keepdim=True)) / temperature[:, None]  # so that nothing overflows
    scaled = _filter(scaled, batch, rows)
    noise = torch.from_numpy(uniforms(batch.seeds[rows], batch.positions[rows])).to(logits.device)
    return _invert(torch.softmax(scaled, dim=-1), noise)


def _invert(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative distribution of each row of `probs` [rows, vocab] passes `noise` [rows].

    First the span of tokens, then the token in it: only sums of spans and one span a row become float64.
    """
    if missing := -probs.shape[-1] % SPAN:
        probs = F.pad(probs, (0, missing))
    spans = probs.unflatten(-1, (-1, SPAN))  # [rows, spans, SPAN]
    span, share = _pass(spans.sum(dim=-1), noise)
    token, _ = _pass(spans[torch.arange(len(spans), device=probs.device), span], share)
    return span * SPAN + token


def _pass(weights: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column at which each row's running sum passes `noise` of its total, and how far into that column."""
    cumulative = weights.double().cumsum(dim=-1)
    total, target = cumulative[:, -1:].contiguous(), noise[:, None] * cumulative[:, -1:]
    last = torch.searchsorted(cumulative, total)  # nothing of weight zero behind it, whatever rounding does
    column = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    column = column.clamp(max=weights.shape[-1] - 1)  # a row without numbers passes nowhere, and must not raise for all
    weight = weights.gather(-1, column).double()
    share = (target - cumulative.gather(-1, column) + weight) / weight
    return column.squeeze(-1), share.squeeze(-1).clamp(0, 1)


def _filter(scaled: torch.Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> torch.Tensor:
    """Mask what min-p, top-k and top-p exclude; whichever does not apply to a row leaves it alone."""
    min_p, top_k, top_p = batch.min_p[rows], batch.top_k[rows], batch.top_p[rows]
    if (min_p > 0).any():
        floor = torch.log(torch.from_numpy(min_p).to(scaled))[:, None] + scaled.amax(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(scaled < floor, MASK)
    if (top_k > 0).any():
        scaled = _keep_top_k(scaled, top_k)
    if (top_p < 1).any():
        scaled = _keep_top_p(scaled, torch.from_numpy(top_p).to(scaled))
    return scaled


def _keep_top_k(scaled: torch.Tensor, top_k: NDArray[np.int64]) -> torch.Tensor:
    vocab = scaled.shape[-1]
    k = torch.from_numpy(np.where(top_k > 0, np.minimum(top_k, vocab), vocab)).to(scaled.device)
    limited = int(k[k < vocab].max()) if bool((k < vocab).any()) else 0
    if limited == 0:
        return scaled
    top = scaled.topk(limited, dim=-1).values
    kth = top.gather(-1, (k.clamp(max=limited) - 1)[:, None])
    return scaled.masked_fill((scaled < kth) & (k < vocab)[:, None], MASK)


def _keep_top_p(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of most likely tokens whose probability reaches p, the boundary token included."""
    probs = torch.softmax(scaled, dim=-1)
    count = min(TOP_CANDIDATES, probs.shape[-1])
    top = probs.topk(count, dim=-1).values
    if bool((top.sum(dim=-1) < top_p).logical_and(top_p < 1).any()):
        top = probs.sort(dim=-1, descending=True).values
    before = top.cumsum(dim=-1) - top  # what is reached before each candidate
    kept = (before < top_p[:, None]).sum(dim=-1).clamp(min=1)
    least = top.gather(-1, (kept - 1)[:, None])
    return scaled.masked_fill((probs < least) & (top_p < 1)[:, None], MASK)


def _top_logprobs(raw: torch.Tensor, batch: SamplingBatch) -> list[tuple[torch.Tensor, list[tuple[int, float]]] | None]:
    """Per row that asks: all its log-probabilities, and the top ones. Rows that ask for as many are taken together."""
    out: list[tuple[torch.Tensor, list[tuple[int, float]]] | None] = [None] * len(raw)
    for count in np.unique(batch.num_logprobs[batch.num_logprobs >= 0]).tolist():
        rows = np.flatnonzero(batch.num_logprobs == count)
        logprobs = torch.log_softmax(raw[torch.from_numpy(rows).to(raw.device)], dim=-1)
        top = logprobs.topk(count)  # of equal ones, which come first depends on the count alone
        found = zip(rows.tolist(), logprobs, top.indices.tolist(), top.values.tolist(), strict=True)
        for row, all_of_row, tokens, values in found:
            out[row] = (all_of_row, list(zip(tokens, values, strict=True)))
    return out


def _chosen_first(
    row: tuple[torch.Tensor, list[tuple[int, float]]] | None, token_id: int
) -> list[tuple[int, float]] | None:
    return None if row is None else [(token_id, float(row[0][token_id])), *row[1]]
