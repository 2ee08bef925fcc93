"""Addresses of images that need no key: signed, and good for an hour.

The secret is the process's own, so a restart ends all of them.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable

FOLDER = "/v1/images/files/"
SECONDS = 3600


class Links:
    """Signs addresses of the gallery's images, and checks them."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._secret, self._clock = secrets.token_bytes(32), clock

    def path(self, id: str) -> str:
        """The path and query of an image's address."""
        expires = int(self._clock()) + SECONDS
        return f"{FOLDER}{id}.png?expires={expires}&signature={self._signature(id, expires)}"

    def good(self, id: str, expires: int, signature: str) -> bool:
        """Whether the address is one of ours and has not expired."""
        expected = self._signature(id, expires).encode()
        return hmac.compare_digest(expected, signature.encode()) and self._clock() < expires

    def _signature(self, id: str, expires: int) -> str:
        return hmac.new(self._secret, f"{id} {expires}".encode(), hashlib.sha256).hexdigest()
