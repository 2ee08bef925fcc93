"""What killed runs left is removed by the next one, and nothing else."""

import os
import subprocess
import sys

from koala.utils.atomic import new_folder


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder, name):
    (folder / name).mkdir()
    (folder / name / "half").write_text("half")


def test_leftovers_of_ended_processes_are_removed(tmp_path):
    ended = ended_process()
    for name in (f".out.{ended}.part", f".out.{os.getpid()}.part"):  # a container reuses numbers
        leave(tmp_path, name)
    kept = (f".out.{os.getppid()}.part", f".other.{ended}.part", f".out.{ended}.part.txt", "out.2")
    for name in kept:
        leave(tmp_path, name)
    with new_folder(tmp_path / "out") as part:
        (part / "file").write_text("whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out"])
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_a_folder_that_was_being_replaced_comes_back(tmp_path):
    leave(tmp_path, f".out.{ended_process()}.old")
    try:
        with new_folder(tmp_path / "out", replace=True):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["half"]
