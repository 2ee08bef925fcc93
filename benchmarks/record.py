"""How a benchmark keeps what it measured: as JSON, with the command that makes it again."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any


def command(name: str) -> str:
    """The line that runs the benchmark `name` as it was run now."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def keep(file: Path, figures: Any) -> None:
    """Writes a record and prints it."""
    _write(file, figures)
    print(json.dumps(figures, indent=1))


def keep_as(name: str, file: Path, figures: Any) -> None:
    """Writes a record beside those of other names in the file, and prints it."""
    _write(file, _known(file, {}) | {name: figures})
    print(json.dumps(figures, indent=1))


def keep_among(file: Path, figures: dict[str, Any], *key: str) -> None:
    """Writes a record in the place of the file's one of the same `key`, and prints it."""
    others = [one for one in _known(file, []) if any(one[name] != figures[name] for name in key)]
    _write(file, [*others, figures])
    print(json.dumps(figures, indent=1))


def _known(file: Path, none: Any) -> Any:
    return json.loads(file.read_text()) if file.exists() else none


def _write(file: Path, figures: Any) -> None:
    file.write_text(json.dumps(figures, indent=1) + "\n")
