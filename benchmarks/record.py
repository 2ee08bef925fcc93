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
    text = json.dumps(figures, indent=1)
    file.write_text(text + "\n")
    print(text)
