"""The digest chain: the identity of a full block.

    root      = sha256(canonical JSON of what the KV depends on: weights, dtype, rope, namespace, ...)
    digest[i] = sha256(digest[i-1] | token ids of block i as little-endian int64)

What it is: naming. What it knows nothing about: where the block lies and how its
bytes are laid out; layout belongs to the envelope of stored bytes. Invariant:
equal digests mean equal KV up to rounding; sha256 keeps that true even when
somebody chooses tokens to collide (non-cryptographic chains have been attacked,
CVE-2025-25183).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence

Digest = bytes
ChainLink = tuple[int, int]  # a link of the chain where it lies: (block_id, life of that block)
CHAIN_ROOT: ChainLink = (-1, 0)
DigestFn = Callable[[Digest, Sequence[int]], Digest]


def root_digest(identity: Mapping[str, object]) -> Digest:
    """The chain's root: 32 bytes that bind everything but the tokens."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()


def block_digest(parent: Digest, token_ids: Sequence[int]) -> Digest:
    """The digest of a block whose predecessor's digest is `parent`."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}q", *token_ids)).digest()
