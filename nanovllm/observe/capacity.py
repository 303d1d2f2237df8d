"""Capacity: how many bytes KV takes, and how many requests fit, by arithmetic alone.

What it is: integers in, integers out. Nothing was allocated and nothing ran: every
figure made here is `estimated`. What it knows nothing about: model files, tensors,
the engine, how a request behaves before its last token.

    KV bytes per token = 2 (K and V) x layers x KV heads x head_dim x bytes per number

A request of P prompt and O output tokens holds P tokens when its prefill ends and P + O - 1 when its last
step runs: the last sampled token ends it before it has KV. Token-exact counts tokens; block-exact counts the
blocks that hold them, which is what a pool gives out. Their difference, the empty slots of the last block, is the
approximation bound of the token-exact figure: under `block_size` tokens a request.

Invariants: block-exact >= token-exact; the parts of a `Ledger` add up to its memory, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass

LABEL = "estimated"
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class KVShape:
    """What KV bytes depend on."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def formula(self) -> str:
        """The arithmetic of `token_bytes`, with its numbers."""
        return (
            f"2 x {self.num_layers} layers x {self.num_kv_heads} KV heads x {self.head_dim} head_dim "
            f"x {self.dtype_bytes} B = {self.token_bytes:,} B"
        )


@dataclass(frozen=True)
class RequestShape:
    """One kind of request, as lengths in tokens; at least 1 each."""

    prompt: int
    output: int

    @property
    def tokens_at_prefill(self) -> int:
        """Tokens it holds KV for when its prefill ends."""
        return self.prompt

    @property
    def tokens_at_end(self) -> int:
        """Tokens it holds KV for in its last step."""
        return self.prompt + self.output - 1


@dataclass(frozen=True)
class StateSize:
    """The KV of so many tokens of one request, both ways of counting."""

    tokens: int
    block_size: int
    token_bytes: int

    @property
    def blocks(self) -> int:
        """Blocks that hold them."""
        return -(-self.tokens // self.block_size)

    @property
    def token_exact_bytes(self) -> int:
        """Tokens x bytes of a token."""
        return self.tokens * self.token_bytes

    @property
    def block_exact_bytes(self) -> int:
        """Blocks x bytes of a block."""
        return self.blocks * self.block_size * self.token_bytes

    @property
    def bound_bytes(self) -> int:
        """The approximation bound: by how much token-exact is less than what a pool gives out."""
        return self.block_exact_bytes - self.token_exact_bytes

    @property
    def bound_tokens(self) -> int:
        """The same as empty slots of the last block."""
        return self.blocks * self.block_size - self.tokens


@dataclass(frozen=True)
class Pool:
    """Memory for KV, cut into blocks."""

    memory_bytes: int
    block_size: int
    shape: KVShape

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.block_size * self.shape.token_bytes

    @property
    def num_blocks(self) -> int:
        """Whole blocks that fit."""
        return self.memory_bytes // self.block_bytes

    def size_of(self, tokens: int) -> StateSize:
        """One request's KV of `tokens` tokens in this pool."""
        return StateSize(tokens, self.block_size, self.shape.token_bytes)

    def concurrency(self, tokens: int, shared_tokens: int = 0) -> int:
        """Requests of `tokens` tokens that fit at once, where each finds its first `shared_tokens` resident.

        Only full blocks before the one with the last token can be shared; they are there once.
        """
        shared = min(shared_tokens, tokens - 1) // self.block_size
        private = self.size_of(tokens).blocks - shared
        return max(self.num_blocks - shared, 0) // private

    def ledger(self, tokens: int) -> Ledger:
        """Where the memory goes when as many requests of `tokens` tokens as fit are resident."""
        size, count = self.size_of(tokens), self.concurrency(tokens)
        return Ledger(
            requests=count,
            live_bytes=count * size.token_exact_bytes,
            tail_bytes=count * size.bound_bytes,
            left_over_bytes=(self.num_blocks - count * size.blocks) * self.block_bytes,
            uncut_bytes=self.memory_bytes - self.num_blocks * self.block_bytes,
        )


@dataclass(frozen=True)
class Ledger:
    """A full pool, byte for byte: what holds tokens, and the three ways in which the rest is lost."""

    requests: int
    live_bytes: int
    """KV of tokens."""
    tail_bytes: int
    """Internal fragmentation: empty slots in last blocks."""
    left_over_bytes: int
    """Free blocks, too few for one more request."""
    uncut_bytes: int
    """The end of the memory, less than a block."""

    @property
    def memory_bytes(self) -> int:
        """The sum of the parts."""
        return self.live_bytes + self.tail_bytes + self.left_over_bytes + self.uncut_bytes

    @property
    def used_share(self) -> float:
        """The share of theoretical capacity that holds tokens."""
        return self.live_bytes / self.memory_bytes


def reserved_concurrency(memory_bytes: int, reserved_tokens: int, shape: KVShape) -> int:
    """Requests that fit at once where each reserves one contiguous piece for `reserved_tokens` tokens."""
    return memory_bytes // (reserved_tokens * shape.token_bytes)
