"""The remote tier: a Valkey or Redis server that several engines may share.

    nanovllm:<key hex>      u32 number of parts | MAC of the whole (32 bytes, or none)
    nanovllm:<key hex>:<i>  part i of the sealed bytes

What it is: sealed bytes in a server's memory, split into parts of `part_bytes`, because a server bounds a
value (512 MiB by default) and answers others meanwhile. What it knows nothing about: who else writes
there. Invariants: nothing the server sends is believed: the reader verifies the envelope, and with a
`mac_key` this tier verifies a keyed BLAKE2b first, so that only who has the key can place state that is
accepted. No more is fetched of a key than `max_bytes`, whatever lies there: longer, of another type or in more
parts is a miss. Every command has a socket timeout; room is the server's business (`maxmemory`): its refusal
is a TierFullError. Keys expire after `ttl_s`, so that nothing outlives its last writer for ever.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis

from nanovllm.errors import TierError, TierFullError
from nanovllm.state.tiers.tier import Found, Item

PART_BYTES, MAX_BYTES = 4 << 20, 64 << 20
MAC_BYTES = 32
ADDRESS = "It is like redis://HOST:6379 or rediss://:PASSWORD@HOST:6379/0; in a password, / ? # @ are written as %2F..."
_COUNT = struct.Struct("<I")


class RemoteTier:
    """One server; one connection per thread that talks to it."""

    name = "remote"
    quota_bytes = None
    used_bytes = 0  # not ours to count: others write there, too, and the server evicts
    durable = False
    shared = True

    def __init__(
        self,
        url: str,
        *,
        mac_key: bytes | None = None,
        timeout_s: float = 2.0,
        ttl_s: int = 86_400,
        part_bytes: int = PART_BYTES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._mac_key, self._ttl_s = mac_key, ttl_s
        self.warnings: list[str] = []
        self._part_bytes, self._max_parts = part_bytes, -(-max_bytes // part_bytes)
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None, health_check_interval=0
            )
        except (ValueError, redis.RedisError):  # what they say may quote the password
            raise TierError("The remote tier's address cannot be used.", hint=ADDRESS) from None

    def write(self, items: Sequence[Item]) -> None:
        """One round trip. The head is written last, so that a reader never finds it without its parts."""
        with _server_errors():
            pipe = self._client.pipeline(transaction=False)
            for item in items:
                starts = range(0, len(item.sealed), self._part_bytes)
                if len(starts) > self._max_parts:
                    raise TierError(f"{len(item.sealed):,} bytes are more than the remote tier takes of one piece.")
                for i, start in enumerate(starts):
                    pipe.set(_part(item.key, i), item.sealed[start : start + self._part_bytes], ex=self._ttl_s)
                pipe.set(_head(item.key), _COUNT.pack(len(starts)) + self._mac(item), ex=self._ttl_s)
            pipe.execute()

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Two round trips: the heads, then the parts."""
        with _server_errors():
            heads = self._get([_head(key) for key in keys], _COUNT.size + MAC_BYTES)
            counts = [self._count(head) for head in heads]
            names = [_part(key, i) for key, count in zip(keys, counts) for i in range(count)]
            parts = iter(self._get(names, self._part_bytes))
        found = [[next(parts) for _ in range(count)] for count in counts]
        return [self._whole(key, head, own) for key, head, own in zip(keys, heads, found)]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """One round trip."""
        with _server_errors():
            pipe = self._client.pipeline(transaction=False)
            for key in keys:
                pipe.exists(_head(key))
            return [bool(answer) for answer in pipe.execute()]

    def drop(self, keys: Sequence[bytes], *, scrub: bool = False) -> None:
        """Heads and parts. What the server wrote into files of its own is the server's."""
        with _server_errors():
            heads = self._get([_head(key) for key in keys], _COUNT.size + MAC_BYTES)
            names = [_part(key, i) for key, head in zip(keys, heads) for i in range(self._count(head))]
            names += [_head(key) for key in keys]
            if names:
                self._client.unlink(*names)

    def scan(self) -> Iterator[Found]:
        """What a server holds is asked for key by key; one that does not answer now is a warning."""
        try:
            with _server_errors():
                self._client.ping()
        except TierError as error:
            self.warnings.append(f"{error.message} It is tried again from time to time; serving goes on without it.")
        return iter(())

    def quarantine(self, key: bytes, sealed: bytes | None) -> None:
        """Dropped: there is no place of ours on the server."""
        self.drop([key])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _get(self, names: list[str], longest: int) -> list[bytes | None]:
        """The strings of these names; None for what is not there, is no string or has more than `longest` bytes."""
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.getrange(name, 0, longest)  # one byte more than it may have
        return [_string(value, longest) for value in pipe.execute(raise_on_error=False)]

    def _count(self, head: bytes | None) -> int:
        """How many parts a head promises; 0 where it is no head."""
        if head is None or len(head) < _COUNT.size:
            return 0
        count = int(_COUNT.unpack_from(head)[0])
        return count if count <= self._max_parts else 0

    def _mac(self, item: Item) -> bytes:
        return b"" if self._mac_key is None else mac_of(self._mac_key, item.key, item.sealed)

    def _whole(self, key: bytes, head: bytes | None, parts: list[bytes | None]) -> bytes | None:
        if head is None or not parts or any(part is None for part in parts):
            return None
        sealed = b"".join(part for part in parts if part is not None)
        if self._mac_key is not None and not hmac.compare_digest(
            head[_COUNT.size :], mac_of(self._mac_key, key, sealed)
        ):
            return b""  # nothing that verifies: the reader counts it
        return sealed


def mac_of(mac_key: bytes, key: bytes, sealed: bytes) -> bytes:
    """Keyed BLAKE2b over where the bytes are to lie and the bytes."""
    return hashlib.blake2b(key + sealed, key=mac_key[:64], digest_size=MAC_BYTES).digest()


def _head(key: bytes) -> str:
    return f"nanovllm:{key.hex()}"


def _part(key: bytes, i: int) -> str:
    return f"nanovllm:{key.hex()}:{i}"


def _string(value: object, longest: int) -> bytes | None:
    """What a GETRANGE answered. Raises the server's error, but for that of a value of another type."""
    if isinstance(value, redis.exceptions.ResponseError) and str(value).startswith("WRONGTYPE"):
        return None
    if isinstance(value, Exception):
        raise value
    return value if isinstance(value, bytes) and 0 < len(value) <= longest else None


@contextmanager
def _server_errors() -> Iterator[None]:
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise TierFullError("The remote tier's server is out of memory.") from error
    except redis.RedisError as error:
        raise TierError(f"The remote tier's server failed: {type(error).__name__}.") from error
    except OSError as error:
        raise TierError(f"The remote tier's server cannot be reached: {error.strerror}.") from error
