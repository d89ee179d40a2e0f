"""Media of chat requests, loaded in threads of their own: all of a request, or none.

Few requests at a time hold decoded media, which are much larger than what came over the wire; the next
ones wait. And each loads a few items at a time, to leave threads to the others. What has to be waited
for (hosts, disks) has a lane of its own, so it holds up none that brings its media along.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loramux.config import MediaConfig
from loramux.content import MediaPart

if TYPE_CHECKING:  # importing it for real would import numpy
    from loramux.media import Audio, Image, MediaLoader, Video

MAX_REQUESTS = 8  # of a lane
MAX_THREADS = 16  # likewise; they are started when they are needed
MAX_THREADS_A_REQUEST = 4


@dataclass(frozen=True, slots=True)
class Lane:
    requests: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_REQUESTS))
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(MAX_THREADS, "media")
    )


class MediaLoading:
    """The loading of one app."""

    def __init__(self, config: MediaConfig) -> None:
        self._config = config
        self.inline = Lane()
        self.waiting = Lane()

    @asynccontextmanager
    async def loaded(
        self, parts: Sequence[MediaPart]
    ) -> AsyncIterator[list[Image | Audio | Video]]:
        """What `parts` refer to, in their order, for as long as it is needed decoded.

        Raises InvalidField for too many items before any is loaded, and what the loader raises.
        """
        if not parts:
            yield []
            return
        from loramux.media import MediaLoader

        loader = MediaLoader(self._config)
        loader.check_counts(Counter(part.modality for part in parts), field="messages")
        lane = self.inline if all(part.is_inline for part in parts) else self.waiting
        async with lane.requests:
            yield await self._load(loader, parts, lane.threads)

    async def _load(
        self, loader: MediaLoader, parts: Sequence[MediaPart], threads: ThreadPoolExecutor
    ) -> list[Image | Audio | Video]:
        loop = asyncio.get_running_loop()
        few = asyncio.Semaphore(MAX_THREADS_A_REQUEST)

        async def one(part: MediaPart) -> Image | Audio | Video:
            async with few:
                return await loop.run_in_executor(threads, loader.part, part)

        tasks = [asyncio.create_task(one(part)) for part in parts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:  # one that is refused ends the others, too
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Start nothing more. What runs ends by itself, within `fetch_timeout_s`."""
        for lane in (self.inline, self.waiting):
            lane.threads.shutdown(wait=False, cancel_futures=True)
