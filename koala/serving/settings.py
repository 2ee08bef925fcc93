"""What a server is told when it starts, and how much it lets anybody ask for.

Nothing heavy is imported here: the command line reads it for its defaults.
"""

import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from koala.checkpoints.resolve import resolve_model
from koala.errors import UserError
from koala.generation import validation
from koala.serving.keys import Keys
from koala.utils.device import check_device

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """What the server bears. A request over a limit is refused with the limit's name."""

    queue: int = 256  # pictures of all clients that wait or are on their way
    client_queue: int = 64  # of one client
    pictures: int = 10  # of one request
    pixels: int = 64 * 1024 * 1024  # of all pictures that wait or are on their way
    steps: int = 200  # of one picture
    size: int | None = None  # pixels of one picture; None: four times the native size
    upload_bytes: int = 32 * 1024 * 1024  # of one request's body
    upload_pixels: int = 16 * 1024 * 1024  # of one picture that is given
    rate: float = 600.0  # requests a minute of one client, in the long run
    burst: int = 100  # requests of one client at once
    patience: float = 30.0  # seconds after which a waiting picture counts one priority higher
    drain: float = 60.0  # seconds that what is on its way has when the server is told to stop
    max_batch: int | None = None  # pictures of the native size in one pass; None: measured

    def __post_init__(self) -> None:
        """UserError for a limit under which nothing could be drawn."""
        least = {"rate": 0, "drain": 0}
        for each in fields(self):
            value, lowest = getattr(self, each.name), least.get(each.name, 1)
            if value is not None and not (math.isfinite(value) and value >= lowest):
                name = each.name.replace("_", "-")
                raise UserError(f"--{name} is {value}: allowed are numbers from {lowest} on")


def limits_of(max_size: str | None, **values: float | None) -> Limits:
    """Limits as the command line names them: `max_size` is WIDTHxHEIGHT. UserError."""
    pixels = None
    if max_size is not None:
        match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", max_size.strip(), re.ASCII)
        if match is None:
            raise UserError(f"--max-size {max_size!r}: allowed is WIDTHxHEIGHT, as in 1024x1024")
        pixels = int(match[1]) * int(match[2])
    return Limits(size=pixels, **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Options:
    """How `koala serve` was called."""

    model: str = "koala-mini"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    device: str | None = None
    backend: str | None = None
    vram: str | None = None  # GiB, or "free"
    compile: bool = False
    graphs: bool = False
    lora_dir: Path | None = None
    data: Path = field(default_factory=lambda: data_folder())
    gallery_bytes: int = 4 * 1024**3  # the oldest pictures go first
    gallery_days: float = 30.0
    limits: Limits = Limits()

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK


@dataclass(frozen=True)
class Scale:
    """How many replicas there are."""

    least: int
    most: int

    @staticmethod
    def parse(text: str) -> "Scale":
        """Of N or LEAST-MOST. UserError."""
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text, re.ASCII)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise UserError(f"--replicas {text!r}: allowed is a number, or two as in 1-4")
        return Scale(least, most)


def data_folder() -> Path:
    """$KOALA_DATA, or koala's folder among the user's data ($XDG_DATA_HOME)."""
    if "KOALA_DATA" in os.environ:
        return Path(os.environ["KOALA_DATA"])
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "koala"


def check(options: Options) -> None:
    """UserError for options that do not go together or name what is not there."""
    if options.api_key_file is not None:
        Keys.read(options.api_key_file)
    if options.lora_dir is not None:
        if not options.lora_dir.is_dir():
            raise UserError(f"--lora-dir {options.lora_dir} is no folder: name the LoRAs' one")
        others = {
            "--vram": options.vram, "--compile": options.compile, "--graphs": options.graphs,
            "--backend": options.backend not in (None, "torch"),
        }  # fmt: skip
        for name in (name for name, given in others.items() if given):
            raise UserError(
                f"--lora-dir does not go with {name}: LoRAs that change need the model as PyTorch "
                "runs it; leave one out"
            )
    check_device(options.device)
    validation.runtime(options.backend, options.compile, options.graphs, options.vram)
    resolve_model(options.model)
