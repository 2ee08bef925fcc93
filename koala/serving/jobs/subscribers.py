"""Event streams of jobs: what each subscriber has yet to receive.

Updates come from any thread and are read on an event loop. A newer update replaces an older one of
the same kind and image, so a slow reader skips stale steps and previews, never a finished image,
and needs no more memory.
"""

import asyncio
import contextlib
import threading
from typing import Any

Update = tuple[str, int, Any]  # kind, index of the image, value


class Subscriber:
    """One reader. Create it on the event loop that reads it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._available = asyncio.Event()
        self._lock = threading.Lock()
        self._updates: dict[tuple[str, int], Any] = {}

    def notify(self, kind: str, index: int = 0, value: object = None) -> None:
        """Adds an update in place of an older one of the same kind and image. Thread-safe."""
        with self._lock:
            first = not self._updates
            self._updates.pop((kind, index), None)
            self._updates[kind, index] = value
        if first:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._available.set)

    async def updates(self) -> list[Update]:
        """Waits for updates and returns them, oldest first."""
        await self._available.wait()
        self._available.clear()
        with self._lock:
            updates, self._updates = self._updates, {}
        return [(kind, index, value) for (kind, index), value in updates.items()]
