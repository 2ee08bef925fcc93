"""File names made of values."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def digest(values: Sequence[Any]) -> str:
    """A file name for these values: a hash of their JSON, or of their str if they have none."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:32]
