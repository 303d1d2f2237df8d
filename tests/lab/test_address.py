"""Addresses: what is understood, what is refused, and that the key is in no text."""

from __future__ import annotations

import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.lab.address import Address


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://example.org", "https://example.org:443"),
        ("http://example.org/llm/v1", "http://example.org:80/llm"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses(url: str, shown: str) -> None:
    assert Address.parse(url).url == shown


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:8000", "localhost", "ftp://x", "http://", "http://x:99999", "http://x:y", "http://[::1",
        "http://a b", "http://x/\r\nHost: y", "http://user:secret@x", "http://x/?key=1", "http://x/#a", "http://ü.example",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Address.parse(url)
    assert caught.value.param == "url" and caught.value.hint and "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="api_key must be ASCII"):
        Address.parse("http://x", key)


def test_the_key_is_sent_and_not_shown() -> None:
    address = Address.parse("http://x", "sesame")
    assert address.headers["Authorization"] == "Bearer sesame"
    assert "sesame" not in repr(address) and "sesame" not in address.url
    assert "Authorization" not in Address.parse("http://x").headers
