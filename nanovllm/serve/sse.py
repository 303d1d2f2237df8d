"""Server-sent events: the frames of a streamed answer.

What it is: bytes. What of a frame is the same for a whole answer is rendered once, so a
chunk costs its text. What it knows nothing about: engines, clients. Invariant: a frame
is one `data:` line and an empty one; no text within it ends the line.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects the stream would defeat it
]
_encode = msgspec.json.Encoder().encode
_NULL_LOGPROBS = b',"logprobs":null'
_UNFINISHED = b',"finish_reason":null'


def json_text(text: str) -> bytes:
    """`text` as a JSON string. Line separators that some readers split at are escaped."""
    return _one_line(_encode(text))


def frame(value: object) -> bytes:
    """Any value as one frame."""
    return b"data: " + _encode(value) + b"\n\n"


def event(kind: str, value: object) -> bytes:
    """Any value as one frame that names its kind."""
    return b"event: " + kind.encode() + b"\ndata: " + _one_line(_encode(value)) + b"\n\n"


class ChunkFrames:
    """Frames of one answer's chunks: everything around a choice's own fields, rendered once."""

    def __init__(
        self,
        answer_id: str,
        kind: str,
        created: int,
        model: str,
        n: int,
        *,
        has_usage: bool,
        prompt_tokens: Sequence[int] = (),
    ) -> None:
        """`has_usage`: the stream ends with a usage chunk, so every other one says `usage: null`.

        `prompt_tokens`: of each choice, where every chunk tells its choice's usage so far.
        """
        head = _encode({"id": answer_id, "object": kind, "created": created, "model": model})
        self._start = b"data: " + head[:-1]
        self._heads = [self._start + b',"choices":[{"index":%d,' % index for index in range(n)]
        self._end = b'}],"usage":null}\n\n' if has_usage else b"}]}\n\n"
        self._prompt_tokens, self._generated = prompt_tokens, [0] * n

    def count(self, index: int, tokens: int) -> None:
        """`tokens` more were generated for a choice."""
        self._generated[index] += tokens

    def chunk(
        self, index: int, payload: bytes, logprobs: object | None = None, finish_reason: str | None = None
    ) -> bytes:
        """A chunk with one choice; `payload` is its `"delta":...` or `"text":...`."""
        shown = _NULL_LOGPROBS if logprobs is None else b',"logprobs":' + _encode(logprobs)
        reason = _UNFINISHED if finish_reason is None else b',"finish_reason":"%b"' % finish_reason.encode()
        return self._heads[index] + payload + shown + reason + self._tail(index)

    def usage(self, usage: object) -> bytes:
        """The chunk that carries the usage, and no choice."""
        return self._start + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"

    def _tail(self, index: int) -> bytes:
        if not self._prompt_tokens:
            return self._end
        prompt, generated = self._prompt_tokens[index], self._generated[index]
        counts = (prompt, generated, prompt + generated)
        return b'}],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}\n\n' % counts


def _one_line(data: bytes) -> bytes:
    """JSON without the separators at which some readers split lines."""
    if data.isascii():
        return data
    return (
        data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029").replace(b"\xc2\x85", b"\\u0085")
    )
