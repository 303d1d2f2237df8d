"""Documents' KV, computed while nobody waits for it.

What it is: prefill-only requests, a few at a time, in the order in which they came. What it knows nothing about:
documents, tenants. Invariants: they yield to every other request (the scheduler's rule); what waits is bounded in
tokens; a failure costs the KV and nothing else, and is told to whoever waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from nanovllm.core.sampling_params import SamplingParams
from nanovllm.core.segments import SegmentSpan
from nanovllm.engine.messages import Finished
from nanovllm.engine.request_stream import RequestStream
from nanovllm.errors import NanoVLLMError

logger = logging.getLogger("nanovllm.serve")

AT_ONCE = 2  # one computes while the other's last block is handed over
MOST_TOKENS = 4_000_000  # that wait; ids of a million tokens take some 36 MB
Job = asyncio.Task[Finished | None]


class Submits(Protocol):
    """The part of an engine this module needs."""

    def submit(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        namespace: str = "",
        segments: tuple[SegmentSpan, ...] = (),
        prefill_only: bool = False,
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Queue a request."""
        ...


class Prefills:
    """The prefills of one server, by what they are for."""

    def __init__(self, engine: Submits, timeout_s: float) -> None:
        self._engine, self._timeout_s = engine, timeout_s
        self._jobs: dict[tuple[str, str], Job] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._tokens = 0

    async def start(
        self, key: tuple[str, str], token_ids: list[int], namespace: str, segments: tuple[SegmentSpan, ...]
    ) -> Job | None:
        """Compute the KV of a prompt's beginning; None where too much waits already. Ends the job that had the key."""
        await self.cancel(key)
        if self._tokens + len(token_ids) > MOST_TOKENS:
            return None
        self._tokens += len(token_ids)
        job = asyncio.get_running_loop().create_task(self._run(token_ids, namespace, segments))
        self._jobs[key] = job
        job.add_done_callback(lambda done: self._over(key, done, len(token_ids)))
        return job

    async def cancel(self, key: tuple[str, str]) -> None:
        """Nobody wants it any more; the engine has been told when this returns."""
        job = self._jobs.pop(key, None)
        if job is not None:
            job.cancel()
            await asyncio.wait([job])

    async def _run(self, token_ids: list[int], namespace: str, segments: tuple[SegmentSpan, ...]) -> Finished | None:
        async with self._turns:
            stream = self._engine.submit(
                token_ids,
                SamplingParams(max_tokens=1),
                namespace=namespace,
                segments=segments,
                prefill_only=True,
                timeout_s=self._timeout_s,
            )
            try:
                async for _ in stream:
                    pass
            finally:
                stream.close()
            return stream.finished

    def _over(self, key: tuple[str, str], job: Job, tokens: int) -> None:
        self._tokens -= tokens
        if self._jobs.get(key) is job:
            del self._jobs[key]
        error = None if job.cancelled() else job.exception()
        if error is not None:
            what = error.message if isinstance(error, NanoVLLMError) else type(error).__name__
            logger.warning("The KV of a document was not computed: %s", what)
