"""Who follows a job: what each has yet to be told, the newest of everything.

News comes from any thread and is taken on an event loop. A follower that reads slowly misses
steps and previews that are out of date, never a picture, and costs no more memory for it.
"""

import asyncio
import contextlib
import threading
from typing import Any

News = tuple[str, int, Any]  # what happened, to which picture, and what comes with it


class Listener:
    """One follower. Made on the event loop that it reads on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._lock = threading.Lock()
        self._news: dict[tuple[str, int], Any] = {}

    def tell(self, what: str, index: int = 0, value: object = None) -> None:
        """News of one kind, about one picture, in the place of older of that kind about it."""
        with self._lock:
            first = not self._news
            self._news.pop((what, index), None)
            self._news[what, index] = value
        if first:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it its readers
                self._loop.call_soon_threadsafe(self._woken.set)

    async def news(self) -> list[News]:
        """What there is to tell, oldest first; waits until there is something."""
        await self._woken.wait()
        self._woken.clear()
        with self._lock:
            found, self._news = self._news, {}
        return [(what, index, value) for (what, index), value in found.items()]
