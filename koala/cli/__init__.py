"""The command line: one module a group of commands, each command's arguments and call together.

Nothing of what koala does is here. Arguments are checked by the packages they are for, in modules
that load no torch, before anything else is done.

Exit status: 0 done, 1 failed, 2 bad input (one line on standard error, no traceback), 141 nobody
reads what is printed any more, as in `koala architectures | head -1` (as other tools, no line).
"""

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from koala import __version__
from koala.cli import elsewhere
from koala.cli.command import Command, say
from koala.errors import FailedElsewhere, Failure, UserError, unknown
from koala.utils.collection import own_process
from koala.utils.extras import explained

GROUPS = {  # of `koala --help`: commands, each with the module that has it
    "draw": {"generate": "generate", "serve": "serve"},
    "models": dict.fromkeys(
        ("inspect", "compress", "convert", "export", "architectures"), "models"
    ),
    "training": dict.fromkeys(("prepare", "distill", "finetune", "runs"), "train"),
    "measuring": dict.fromkeys(("evaluate", "benchmark"), "measure"),
}
UNREAD = 128 + 13  # what a shell says of a process that SIGPIPE ended
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    if arguments is None:
        own_process()
        arguments = sys.argv[1:]
    stopping = _sigterm_interrupts()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run(arguments)
    except UserError as error:
        return _complain(error, 2)
    except FailedElsewhere:  # another process of the run says why
        return 1
    except (Failure, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return UNREAD
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 1)
    finally:
        _discard_unwritten()
        stopping()
    return 0


def _run(arguments: Sequence[str]) -> None:
    if not arguments:
        raise UserError("no command given; koala --help lists them")
    name, *rest = arguments
    try:
        if name in ("-h", "--help"):
            print(overview())
        elif name == "--version":
            print(f"koala {__version__}")
        else:
            command = command_named(name)
            command.run(command.parse(rest))
    except ModuleNotFoundError as error:
        raise explained(f"koala {name}", error) from error
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it can be answered if it fails


def _unread() -> bool:
    """Whether the reader of a pipe that is printed to has gone. Windows cannot tell."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _discard_unwritten() -> None:
    """Drops what cannot be printed, which Python would else complain of when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _sigterm_interrupts() -> Callable[[], object]:
    """Makes SIGTERM what Ctrl-C is, so that half-written results are removed; returns the undoing.

    Commands that stop in another way, as `distill` and `serve` do, set their own handlers.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)


def command_named(name: str) -> Command:
    """The command of that name, whose module alone is imported; `UserError` lists the names."""
    if name in elsewhere.COMMANDS:
        raise UserError(f"unknown command {name!r}: that is {elsewhere.COMMANDS[name]}")
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    found: Command = getattr(import_module(f"koala.cli.{COMMANDS[name]}"), name.upper())
    return found


def overview() -> str:
    """What `koala --help` prints: the commands in groups, with an example each."""
    lines = [
        "usage: koala COMMAND ...",
        "",
        "Make Stable-Diffusion-XL-class models small and fast, and draw with them.",
    ]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:"]
        for command in map(command_named, names):
            lines += [f"  {command.name:<14} {command.summary}", f"{'':17}{command.examples[0]}"]
    return "\n".join(
        [*lines, "", "koala COMMAND --help explains a command; koala --version prints the version."]
    )


def _complain(what: object, status: int) -> int:
    with suppress(OSError):  # nobody reads it; the status still tells
        say(" ".join(str(what).split()))
    return status
