"""What all commands share: how one is described, parsed and printed."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from koala.cli import elsewhere
from koala.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A command: what `koala --help` says of it, what it takes, and what it does."""

    name: str
    summary: str  # a line, as the end of "koala NAME: ..."
    examples: tuple[str, ...]  # whole command lines; the first is shown by `koala --help`
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], None]

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options of a command line. UserError for what the command does not take."""
        parser = Parser(
            prog=f"koala {self.name}",
            description=f"{self.summary[0].upper()}{self.summary[1:]}.",
            epilog="examples:\n" + "\n".join(f"  {example}" for example in self.examples),
            formatter_class=_Help,
        )
        self.arguments(parser)
        if line := elsewhere.told(self.name, arguments):
            raise UserError(f"{line}; see koala {self.name} --help")
        options, rest = parser.parse_known_args(arguments)
        if rest:
            close = did_you_mean(rest[0].partition("=")[0], parser.options)
            raise UserError(
                f"koala {self.name} does not take {rest[0]!r}; see koala {self.name} --help{close}"
            )
        return options


class _Help(argparse.RawDescriptionHelpFormatter):
    """argparse's, which leaves names such as koala-700m whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """argparse's, which raises `UserError` for a mistake in place of leaving with a usage."""

    @property
    def options(self) -> list[str]:
        """Every option's spellings."""
        return re.findall(r"--[a-z-]+", self.format_help())

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def add_json(self, what: str) -> None:
        self.add_argument("--json", action="store_true", help=f"print {what} as JSON")

    def add_parts(self, model: str) -> None:
        """The options of `assembled`; `model`: the option that they complete."""
        parts = self.add_argument_group(f"parts for {model}")
        parts.add_argument(
            "--base", metavar="MODEL",
            help="the SDXL model that completes a U-Net alone, file or folder, as Lightning's",
        )  # fmt: skip
        parts.add_argument(
            "--vae", metavar="FILE", help="another VAE: a file, a folder or a Hub id"
        )
        parts.add_argument(
            "--teacher-lora", action="append", default=[], metavar="FILE[:SCALE]",
            help="merge a LoRA into the model's weights, as Lightning's, Hyper-SD's or DMD2's; "
            "repeat for several",
        )  # fmt: skip

    def add_push(self) -> None:
        self.add_argument(
            "--push-to-hub", metavar="ORG/NAME", help="upload the result to the Hugging Face Hub"
        )


def whole(text: str) -> int:
    """A whole number, for `type=`."""
    try:
        return int(text)
    except ValueError:
        meant = _meant(text)
        told = "" if meant is None or meant % 1 or "," in text else f"; write {int(meant)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{told}") from None


def number(text: str) -> float:
    """A number, for `type=`."""
    try:
        return float(text)
    except ValueError:
        meant = _meant(text)
        told = ", such as 0.5" if meant is None else f"; write {meant:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number{told}") from None


def _meant(text: str) -> float | None:
    """The number that a decimal comma, a percent sign or a printer's minus may stand for."""
    plain = re.sub("[\u2212\u2013\u2014]", "-", text.strip()).replace(",", ".")
    percent = plain.endswith("%")
    try:
        found = float(plain.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def listed(names: Iterable[str]) -> str:
    """At least two names in words: "a, b or c"."""
    *most, last = names
    return f"{', '.join(most)} or {last}"


def say(line: str) -> None:
    """Tells a person something on standard error.

    Control characters, which files may have in their names, are written as escapes, and so is what
    the terminal's encoding lacks.
    """
    if sys.stderr is None:  # closed by whoever started this
        return
    plain = "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)
    encoding = sys.stderr.encoding or "utf-8"
    plain = plain.encode(encoding, "backslashreplace").decode(encoding)
    print(f"koala: {plain}", file=sys.stderr, flush=True)


def show(o: argparse.Namespace, value: Any, text: str) -> None:
    """Prints a result: `value` as JSON where --json asks for it, else `text`."""
    print(json.dumps(value, indent=1, default=str) if o.json else text)


def check_push(o: argparse.Namespace) -> None:
    """Before the work: whether the Hub would take its result."""
    if o.push_to_hub is not None:
        from koala.checkpoints.upload import check_target

        check_target(o.push_to_hub)


def push(o: argparse.Namespace, result: Path) -> None:
    if o.push_to_hub is not None:
        from koala.checkpoints.upload import push

        say(f"uploaded: {push(result, o.push_to_hub)}")


def assembled(o: argparse.Namespace, model: str) -> str:
    """The model, put together with the parts that the options name."""
    if not (o.base or o.vae or o.teacher_lora):
        return model
    from koala.generation.validation import loras
    from koala.lora.assembly import assembled

    return str(assembled(model, o.base, o.vae, loras(o.teacher_lora)))


def first_process() -> bool:
    """Whether this is the one that speaks of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
