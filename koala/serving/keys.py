"""The API keys that the server accepts."""

import base64
import hashlib
import hmac
from pathlib import Path

from koala.errors import UserError

SHORTEST_KEY = 16  # characters


class ApiKeys:
    """The accepted API keys, stored as hashes."""

    def __init__(self, keys: list[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    @staticmethod
    def read(file: Path) -> "ApiKeys":
        """Reads one key per line; empty lines and # comments are skipped. UserError."""
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the key file {file} cannot be read: {error}") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"the key file {file} contains no key: write one key per line")
        if min(map(len, keys)) < SHORTEST_KEY:
            raise UserError(
                f"a key in {file} is too short: use at least {SHORTEST_KEY} characters, such as "
                "from `openssl rand -hex 32`"
            )
        return ApiKeys(keys)

    def client(self, authorization: str) -> str | None:
        """The client's name, or None if the header has no valid key.

        The key comes as Bearer, or as the password of Basic for AUTOMATIC1111's tools.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                _, _, key = base64.b64decode(key.strip(), validate=True).decode().partition(":")
            except ValueError:
                return None
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [known for known in self._hashes if hmac.compare_digest(known, given)]
        known_scheme = scheme.lower() in ("bearer", "basic")
        return f"key-{given.hex()[:12]}" if found and known_scheme else None
