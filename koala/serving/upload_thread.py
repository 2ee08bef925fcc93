"""The thread that decodes uploads, one at a time.

A PNG of 50 KB can hold 16 million pixels. Decoded side by side, forty of them took gigabytes.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class UploadThread:
    """Runs functions that decode uploads in one thread of their own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "koala-uploads")

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls the function in turn and returns what it returns."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    def close(self) -> None:
        """Stops after the call in progress."""
        self._thread.shutdown(cancel_futures=True)
