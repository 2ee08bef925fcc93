"""What killed runs left is removed by the next one, and nothing else."""

import os
import subprocess
import sys

import pytest

from koala.errors import UserError
from koala.utils.atomic import claim, locked, new_file, new_folder, write_text


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


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot sync what is open for reading")
@pytest.mark.parametrize("kind", [new_folder, new_file])
def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, kind):
    out, synced = tmp_path / "out", {}
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.setdefault(os.fstat(handle).st_ino, out.exists())
    )
    with kind(out) as part:
        file = part if kind is new_file else part / "inner" / "file"
        file.parent.mkdir(exist_ok=True)
        file.write_text("whole")
    inside = [out, *out.rglob("*")]
    assert {path: synced[path.stat().st_ino] for path in inside} == dict.fromkeys(inside, False)
    assert synced[tmp_path.stat().st_ino] is True  # and then the name


KILLED = """
import os, signal, sys
from pathlib import Path
from koala.utils.atomic import {kind}
with {kind}(Path(sys.argv[1])) as part:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("kind", "write"),
    [("new_folder", "(part / 'x').write_text('half')"), ("new_file", "part.write_text('half')")],
)
def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_same(
    tmp_path, kind, write
):
    """By another process, of another number."""
    for name in ("out", "other"):
        code = KILLED.format(kind=kind, write=write)
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)])
    assert len(os.listdir(tmp_path)) == 2
    if kind == "new_file":
        write_text(tmp_path / "out", "whole")
        write_text(tmp_path / "out", "again")
    else:
        with new_folder(tmp_path / "out") as part:
            (part / "file").write_text("whole")
    left = sorted(os.listdir(tmp_path))
    assert left[1:] == ["out"] and left[0].startswith(".other.")


def test_files_of_other_machines_and_open_ones_stay(tmp_path):
    ended = ended_process()
    other = tmp_path / f".out.00000000-{ended}-0123abcd.part"
    other.write_text("of another machine")
    with new_file(tmp_path / "out") as part:
        part.write_text("first")
        with new_file(tmp_path / "out") as second:
            second.write_text("second")
        assert part.exists() and other.exists()
    assert (tmp_path / "out").read_text() == "first"
    os.utime(other, (0, 0))
    (tmp_path / "out").unlink()
    with new_folder(tmp_path / "out"):
        assert not other.exists()  # nobody wrote to it for a day


def test_a_run_is_locked_against_another_process(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom koala.utils.atomic import claim, locked\n"
        "with locked(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="run is in use by another process"), locked(run):
            pass
        process.kill()
    with locked(run):
        (run / "file").touch()
    assert os.listdir(run) == ["file"]
    with locked(tmp_path / "new"):
        pass
    assert os.listdir(tmp_path) == ["run"]


def test_a_claim_names_each_setting_that_differs_once_and_as_it_is_set(tmp_path):
    def settings(samples: int, batch: int, lora: dict | None) -> dict:
        recipe = {"training": {"samples": samples, "batch": batch}, "lora": lora}
        return {"samples": samples, "batch": batch, "device": "cpu", "recipe": recipe}

    file = tmp_path / "run" / "run.json"
    file.parent.mkdir()
    claim(file, settings(32, 8, None))
    claim(file, settings(32, 8, None))
    with pytest.raises(UserError) as refused:
        claim(file, settings(64, 4, {"rank": 2}))
    assert str(refused.value) == (
        f"{file.parent} was made with lora=None, now it is {{'rank': 2}}; training.batch=8, now it "
        "is 4; training.samples=32, now it is 64; take another --out, or remove this folder"
    )
