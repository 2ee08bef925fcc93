"""Commands whose output nobody reads to its end, as in `koala architectures | head -1`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])
PRINTING = [
    ["--help"],
    ["serve", "--help"],
    ["architectures"],
    ["architectures", "--json"],
    ["inspect", "koala-mini"],
    ["generate", "--list-words"],
]


def run(arguments: list[str], unbuffered: str, **streams: int) -> tuple[int, bytes]:
    """Status, and what stands on standard error if that is a pipe of the test's."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-m", "koala", *arguments], env=environment, check=False, **streams
    )
    return done.returncode, done.stderr


@pytest.fixture
def unread():
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_who_has_enough_is_no_fault(arguments, unbuffered, unread):
    status, told = run(arguments, unbuffered, stdout=unread, stderr=subprocess.PIPE)
    # argparse passes over what it cannot write of its help
    assert status in ((141, 0) if "--help" in arguments[1:] else (141,))
    assert told == b""


def test_a_mistake_that_nobody_reads_still_has_its_status(unread):
    assert run(["no-such-command"], "", stdout=unread, stderr=unread)[0] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_is_told_in_a_line():
    with open("/dev/full", "wb") as full:
        status, told = run(["architectures"], "", stdout=full.fileno(), stderr=subprocess.PIPE)
    assert (status, len(told.splitlines())) == (1, 1)
