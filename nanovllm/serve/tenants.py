"""Tenants: which key is whose, and which state its holder sees.

What it is: API keys as sha256 digests, and the way from an Authorization header to a
`Tenant`. What it knows nothing about: routes, HTTP answers. Invariants: every key is
compared whichever matches, in constant time; a namespace is derived from the key and
never is the key; without any key everybody is the one anonymous tenant.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from nanovllm.errors import AuthenticationError, ConfigError
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.context import Tenant

ANONYMOUS = Tenant("", "")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEY = re.compile(r"[!-+\--~]{1,512}")  # what a header can carry, but for the comma: it stands between keys


class Tenants:
    """All keys of one server. Raises ConfigError for keys that cannot be told apart or sent."""

    def __init__(self, config: ServerConfig) -> None:
        named = [_split(text) for text in (*config.api_key, *_lines_of(config.api_key_file))]
        self.has_admin = config.admin_key is not None
        self._by_digest: list[tuple[bytes, Tenant]] = []
        for number, (name, key) in enumerate(named, 1):
            self._add(name or f"tenant-{number}", key, config.share_prefix, is_admin=False)
        if config.admin_key is not None:
            self._add("admin", config.admin_key, config.share_prefix, is_admin=True)

    @property
    def has_keys(self) -> bool:
        """True where a key is asked for. Any key closes the server, the admin's too."""
        return bool(self._by_digest)

    def authenticate(self, authorization: bytes | None) -> Tenant:
        """The tenant of an Authorization header. Raises AuthenticationError."""
        if not self._by_digest:
            return ANONYMOUS
        scheme, _, key = (authorization or b"").strip().partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for known, tenant in self._by_digest:  # all of them: how long it takes says nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None or scheme.lower() != b"bearer":
            raise AuthenticationError(
                "The API key is missing or unknown.", hint="Send it as: Authorization: Bearer KEY."
            )
        return found

    def _add(self, name: str, key: str, is_shared: bool, *, is_admin: bool) -> None:
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"The key of {name} must be printable ASCII without blanks and commas.",
                param="api_key",
                hint="Give several keys by repeating --api-key, or with commas in NANOVLLM_API_KEY.",
            )
        digest = hashlib.sha256(key.encode()).digest()
        for known, tenant in self._by_digest:
            if known == digest or tenant.name == name:
                what = "name" if tenant.name == name else "key"
                raise ConfigError(f"{name} and {tenant.name} have the same {what}.", param="api_key")
        owner = namespace_of(key)
        self._by_digest.append((digest, Tenant(name, "" if is_shared else owner, is_admin, owner)))


def namespace_of(key: str) -> str:
    """The namespace of a key's holder; the key cannot be found from it, nor from the digest it is compared by."""
    return hashlib.sha256(b"nanovllm namespace\0" + key.encode()).hexdigest()[:32]


def _split(text: str) -> tuple[str | None, str]:
    """`NAME:KEY` or `KEY`. A colon within a key must come after a name."""
    name, colon, key = text.partition(":")
    if not colon:
        return None, text
    if not _NAME.fullmatch(name):
        raise ConfigError("The name before a key's colon must be 1 to 64 of A-Z a-z 0-9 _ . -.", param="api_key")
    return name, key


def _lines_of(path: str | None) -> Iterable[str]:
    if path is None:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"The key file {path} cannot be read: {why}.", param="api_key_file") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:  # an empty file must not open the server
        raise ConfigError(f"The key file {path} holds no key.", param="api_key_file")
    return keys
