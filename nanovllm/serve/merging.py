"""Several request streams as one: what all of them made since the last turn.

What it is: one async generator. What it knows nothing about: HTTP. Invariants: a failure
of any stream is raised at once; whatever ends the iteration, no task of it stays behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from nanovllm.engine.messages import Delta
from nanovllm.engine.request_stream import RequestStream

Batch = list[tuple[int, list[Delta]]]
_News = tuple[int, list[Delta]] | Exception | None  # None: one stream has ended


async def merged(streams: Sequence[RequestStream]) -> AsyncGenerator[Batch, None]:
    """Batches of (number of the stream, its new deltas), until every stream has ended."""
    if len(streams) == 1:
        async for deltas in streams[0]:
            yield [(0, deltas)]
        return
    news: asyncio.Queue[_News] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(number, stream, news)) for number, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            items = [await news.get()]
            while not news.empty():
                items.append(news.get_nowait())
            left -= items.count(None)
            batch = [item for item in items if isinstance(item, tuple)]
            if batch:
                yield batch
            for item in items:
                if isinstance(item, Exception):
                    raise item
    finally:
        for task in tasks:
            task.cancel()


async def _pump(number: int, stream: RequestStream, news: asyncio.Queue[_News]) -> None:
    try:
        async for deltas in stream:
            news.put_nowait((number, deltas))
        news.put_nowait(None)
    except Exception as error:  # noqa: BLE001  whatever it is, the consumer raises it
        news.put_nowait(error)
