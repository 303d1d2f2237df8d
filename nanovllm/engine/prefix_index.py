"""PrefixIndex: which full blocks can be found by the tokens they hold.

What it is: the map from digest to block and the two questions asked of it: which
blocks hold this prefix (`match`), and may this block be found from now on
(`publish`). What it knows nothing about: reference counts, free lists, eviction.

Invariants: hash_to_block_id[d] = b <=> blocks[b].hash_value = d, one to one. A hit
is believed only after the block's tokens *and* its parent were compared: by
induction the whole prefix is. A colliding digest costs a miss, never foreign KV.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nanovllm.core.digest import CHAIN_ROOT, ChainLink, Digest, DigestFn, block_digest
from nanovllm.core.events import EventBus
from nanovllm.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Block:
    """One block. `life` counts how often it was handed out, so that a stale link to it can be told."""

    block_id: int
    ref_count: int = 0
    hash_value: Digest | None = None
    token_ids: tuple[int, ...] = ()
    parent: ChainLink = CHAIN_ROOT
    life: int = 0
    namespace: str = ""  # whose prompt it was published for; the digest binds it, stored bytes are labelled with it

    @property
    def link(self) -> ChainLink:
        """How a child names this block: (block_id, life)."""
        return (self.block_id, self.life)


@dataclass
class PrefixIndex:
    """Digest -> block, over the blocks of one BlockManager."""

    blocks: list[Block]
    block_size: int
    digest_fn: DigestFn = block_digest
    events: EventBus | None = None
    hash_to_block_id: dict[Digest, int] = field(default_factory=dict)
    num_digests: int = 0  # computed so far; tests hold it against one per full block

    def match(self, seq: Sequence) -> list[Block]:
        """The published blocks that hold the sequence's prefix, in order.

        The block with the last known token never matches: at least one token is
        computed, because its logits choose the next one.
        """
        hits: list[Block] = []
        link = CHAIN_ROOT
        for i in range((seq.num_tokens - 1) // self.block_size):
            block = self.find(self.digest(seq, i), link, seq.block(i))
            if block is None:
                break
            hits.append(block)
            link = block.link
        return hits

    def find(self, digest: Digest, parent: ChainLink, token_ids: list[int]) -> Block | None:
        """The published block with this digest, if it really holds these tokens behind this parent."""
        block_id = self.hash_to_block_id.get(digest)
        if block_id is None:
            return None
        block = self.blocks[block_id]
        return block if block.parent == parent and block.token_ids == tuple(token_ids) else None

    def holder_of(self, digest: Digest) -> Block | None:
        """The block published under this digest, whatever it holds."""
        block_id = self.hash_to_block_id.get(digest)
        return None if block_id is None else self.blocks[block_id]

    def publish(self, block: Block, seq: Sequence, i: int, parent: ChainLink) -> None:
        """Make `block` findable as logical block `i` of `seq`. The digest must be free."""
        block.namespace = seq.namespace
        self.enter(block, self.digest(seq, i), seq.block(i), parent, self._parent_digest(seq, i))

    def enter(
        self, block: Block, digest: Digest, token_ids: Iterable[int], parent: ChainLink, parent_digest: Digest
    ) -> None:
        """The same for a block that no sequence of ours computed. The digest must be free."""
        block.hash_value, block.token_ids, block.parent = digest, tuple(token_ids), parent
        self.hash_to_block_id[digest] = block.block_id
        if self.events:
            self.events.block("stored", digest, parent_digest, self.block_size)

    def unpublish(self, block: Block) -> None:
        """The block cannot be found any more; nothing happens if it could not before."""
        if block.hash_value is None:
            return
        del self.hash_to_block_id[block.hash_value]
        if self.events:
            self.events.block("removed", block.hash_value, b"", self.block_size)
        block.hash_value, block.token_ids, block.parent = None, (), CHAIN_ROOT

    def digest(self, seq: Sequence, i: int) -> Digest:
        """The digest of full block `i`: computed once, kept on the sequence."""
        while len(seq.digests) <= i:
            done = len(seq.digests)
            seq.digests.append(self.digest_fn(self._parent_digest(seq, done), seq.block(done)))
            self.num_digests += 1
        return seq.digests[i]

    def _parent_digest(self, seq: Sequence, i: int) -> Digest:
        return seq.digests[i - 1] if i else seq.root_digest
