"""The gallery and the table of jobs: equal to a plain model through everything, also crashes."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image

from koala.errors import UserError
from koala.generation import Settings, read_settings
from koala.serving.jobs.database import FILE, Database
from koala.serving.jobs.gallery import THUMBNAIL, Gallery
from koala.serving.jobs.table import AlreadyEnded, JobLimits, JobTable, TooManyJobs

SETTINGS = Settings("a red fox, ünd", "", 10, 3.5, 7, 64, 64, "koala-mini", "0.1.0")
CLIENTS = ("ann", "bob")
LARGE = 1 << 40
AGE = 1000.0  # seconds


def random_image(side: int = 16) -> Image.Image:
    return Image.effect_noise((side, side), 80).convert("RGB")


def gallery_of(folder, most_bytes=LARGE, most_seconds=AGE, clock=time.time) -> Gallery:
    return Gallery(Database(folder), most_bytes, most_seconds, clock)


# --- one operation at a time ----------------------------------------------------------------


def test_a_image_comes_back_as_it_was_also_after_a_restart(tmp_path):
    gallery, image = gallery_of(tmp_path / "new" / "data"), random_image(300)
    kept = gallery.add(image, SETTINGS, "ann")
    gallery.database.close()
    gallery = gallery_of(tmp_path / "new" / "data")
    assert gallery.get(kept.id) == kept and kept.settings == json.loads(
        json.dumps(asdict(SETTINGS))
    )
    png = gallery.png(kept.id)
    with Image.open(io.BytesIO(png)) as found:
        assert found.tobytes() == image.tobytes()
    assert read_settings(io.BytesIO(png)) == SETTINGS
    thumbnail = gallery.thumbnail(kept.id)
    with Image.open(io.BytesIO(thumbnail)) as found:
        assert (found.format, found.size) == ("WEBP", (THUMBNAIL, THUMBNAIL))
    assert kept.bytes == len(png) + len(thumbnail) == gallery.size()
    assert gallery.remove(kept.id) and not gallery.remove(kept.id)
    assert gallery.get(kept.id) is gallery.png(kept.id) is gallery.thumbnail(kept.id) is None
    assert gallery.size() == 0 and os.listdir(gallery.folder) == []


def test_what_is_no_id_names_no_image(tmp_path):
    gallery = gallery_of(tmp_path)
    for id in ("", "x", "../koala.sqlite3", "%", "\x00", "'", "\ud800", "g" * 32):
        assert gallery.png(id) is gallery.get(id) is None


def test_a_image_larger_than_the_bound_stays_until_the_next(tmp_path):
    gallery = gallery_of(tmp_path, most_bytes=1)
    first = gallery.add(random_image(), SETTINGS, "ann")
    assert gallery.page(9) == [first]
    second = gallery.add(random_image(), SETTINGS, "ann")
    assert gallery.page(9) == [second] and os.listdir(gallery.folder) == [f"{second.id}.png"]


def test_a_image_whose_transaction_fails_leaves_nothing(tmp_path):
    gallery = gallery_of(tmp_path)
    with pytest.raises(ZeroDivisionError):
        gallery.add(random_image(), SETTINGS, "ann", also=lambda db, id: 1 / 0)
    assert gallery.page(9) == [] and os.listdir(gallery.folder) == []
    gallery.add(random_image(), SETTINGS, "ann")  # and the next goes in


def test_opening_removes_what_a_crash_left_and_nothing_else(tmp_path):
    gallery = gallery_of(tmp_path)
    kept, lost = (gallery.add(random_image(), SETTINGS, "ann") for _ in range(2))
    gallery.database.close()
    folder = gallery.folder
    (folder / f".{'a' * 32}.part").write_bytes(b"half")
    (folder / f"{'b' * 32}.png").write_bytes(b"no row")
    (folder / "mine.png").write_bytes(b"somebody else's")
    (folder / f"{lost.id}.png").unlink()
    gallery = gallery_of(tmp_path)
    assert sorted(os.listdir(folder)) == sorted([f"{kept.id}.png", "mine.png"])
    assert gallery.page(9) == [kept] and gallery.size() == kept.bytes


def test_a_folder_has_one_server(tmp_path, monkeypatch):
    monkeypatch.setattr("koala.serving.jobs.database.WAIT", 0.1)
    database = Database(tmp_path)
    with pytest.raises(UserError, match="in use by another server"):
        Database(tmp_path)
    database.close()
    Database(tmp_path).close()


def test_other_files_and_versions_are_refused_in_one_line(tmp_path):
    (tmp_path / FILE).write_text("no database at all, but long enough to be looked at\n" * 20)
    with pytest.raises(UserError, match="is not a gallery"):
        Database(tmp_path)
    (tmp_path / FILE).unlink()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(UserError, match="is not a koala gallery"):
        Database(tmp_path)
    (tmp_path / FILE).unlink()
    Database(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UserError, match="has version 99, this koala writes version 1"):
        Database(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name a folder that you may write to"):
        Database(tmp_path / "file")


def test_a_job_ends_once_and_takes_nothing_more(tmp_path):
    gallery = gallery_of(tmp_path)
    table = JobTable(gallery.database)
    job = table.accept("ann", {"prompt": "a"}, {"image": "QUJD"}, 2, 10)
    assert table.uploads(job.id) == {"image": "QUJD"}
    first = gallery.add(random_image(), SETTINGS, "ann", partial(keep, table, job.id, 0))
    with pytest.raises(AlreadyEnded):
        gallery.add(random_image(), SETTINGS, "ann", partial(keep, table, job.id, 0))
    table.image_failed(job.id, 1, "no memory", "memory", 2.0)
    found = table.get(job.id)
    assert (found.status, found.message, found.code) == ("failed", "no memory", "memory")
    assert found.ended == {0: first.id, 1: None} and table.uploads(job.id) == {}
    with pytest.raises(AlreadyEnded):
        table.image_failed(job.id, 1, "again", "memory", 2.0)
    assert not table.cancel(job.id) and gallery.page(9) == [first]


def test_waiting_jobs_are_bounded_in_number_for_each_and_all_and_in_bytes(tmp_path):
    table = JobTable(Database(tmp_path), JobLimits(jobs=3, jobs_of_client=2, uploads=100))
    jobs = [table.accept("ann", {}, {}, 1, 10) for _ in range(2)]
    with pytest.raises(TooManyJobs) as full:
        table.accept("ann", {}, {}, 1, 10)
    assert full.value.mine
    with pytest.raises(TooManyJobs) as full:
        table.accept("bob", {}, {"image": "x" * 100}, 1, 10)
    assert not full.value.mine
    table.accept("bob", {}, {"image": "x" * 80}, 1, 10)
    with pytest.raises(TooManyJobs) as full:
        table.accept("bob", {}, {}, 1, 10)
    assert not full.value.mine
    assert table.cancel(jobs[0].id)
    table.accept("bob", {}, {}, 1, 10)


def test_ended_jobs_are_forgotten_by_age_and_number(tmp_path, monkeypatch):
    monkeypatch.setattr("koala.serving.jobs.table.MOST_ENDED", 2)
    now = [0.0]
    table = JobTable(Database(tmp_path), most_seconds=10, clock=lambda: now[0])
    jobs = []
    for now[0] in (0, 1, 2, 3):
        jobs.append(table.accept("ann", {}, {}, 1, 10).id)
        table.cancel(jobs[-1])
    waits = table.accept("ann", {}, {}, 1, 10).id
    table.tidy()
    assert [job.id for job in table.page(9)] == [waits, jobs[3], jobs[2]]
    now[0] = 12.5
    table.tidy()
    assert [job.id for job in table.page(9)] == [waits, jobs[3]]


def keep(table, job, place, db, id):
    table.image_finished(db, job, place, id, started=1.0)


# --- against a model ------------------------------------------------------------------------


@dataclass
class Kept:
    client: str
    created: float
    bytes: int


@dataclass
class Asked:
    client: str
    number: int
    status: str = "open"
    ended: dict[int, str | None] = field(default_factory=dict)

    def end(self, place: int, image: str | None) -> None:
        self.ended[place] = image
        if len(self.ended) == self.number:
            self.status = "failed" if None in self.ended.values() else "done"


class StoreMachine(RuleBasedStateMachine):
    """Every operation on the real thing and on dictionaries; a crash is a copy of the files."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="koala-store-"))
        self.now, self.boots = 0.0, 0
        self.images: dict[str, Kept] = {}  # in the order of their making
        self.jobs: dict[str, Asked] = {}
        self.image = Image.new("RGB", (8, 8), "teal")

    @initialize(bound=st.sampled_from([3000, LARGE]))
    def begin(self, bound):
        self.bound = bound
        self.open()

    def open(self):
        database = Database(self.root / str(self.boots))
        self.gallery = Gallery(database, self.bound, AGE, lambda: self.now)
        self.table = JobTable(database, clock=lambda: self.now)
        self.bounds()

    def teardown(self):
        self.gallery.database.close()
        shutil.rmtree(self.root)

    def bounds(self):
        total = sum(kept.bytes for kept in self.images.values())
        for id, kept in list(self.images.items()):
            large = total > self.bound and len(self.images) > 1
            if not large and kept.created >= self.now - AGE:
                break
            total -= self.images.pop(id).bytes

    def add(self, client, also=None):
        kept = self.gallery.add(self.image, SETTINGS, client, also)
        self.images[kept.id] = Kept(client, self.now, kept.bytes)
        self.bounds()
        return kept.id

    @rule(client=st.sampled_from(CLIENTS))
    def add_image(self, client):
        self.add(client)

    @precondition(lambda self: self.images)
    @rule(data=st.data(), owner=st.sampled_from([None, *CLIENTS]))
    def remove_image(self, data, owner):
        id = data.draw(st.sampled_from(sorted(self.images)))
        mine = owner in (None, self.images[id].client)
        assert self.gallery.remove(id, owner) == mine
        if mine:
            del self.images[id]

    @rule(client=st.sampled_from(CLIENTS), number=st.integers(1, 3))
    def accept_job(self, client, number):
        job = self.table.accept(client, {"n": number}, {"image": "eA=="}, number, 10)
        self.jobs[job.id] = Asked(client, number)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), place=st.integers(0, 2), works=st.booleans())
    def end_part(self, data, place, works):
        id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[id]
        place %= job.number
        takes = job.status == "open" and place not in job.ended
        try:
            if works:
                found = self.add(job.client, partial(keep, self.table, id, place))
            else:
                found = None
                self.table.image_failed(id, place, "broken", "failed", 1.0)
        except AlreadyEnded:
            assert not takes
        else:
            assert takes
            job.end(place, found)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel_job(self, data):
        id = data.draw(st.sampled_from(sorted(self.jobs)))
        assert self.table.cancel(id) == (self.jobs[id].status == "open")
        if self.jobs[id].status == "open":
            self.jobs[id].status = "cancelled"

    @rule(seconds=st.floats(1, AGE))
    def wait(self, seconds):
        self.now += seconds
        self.gallery.tidy()
        self.bounds()

    @rule()
    def restart(self):
        self.gallery.database.close()
        self.open()

    @rule(leaves=st.booleans())
    def crash(self, leaves):
        """The files as they are on disk at this moment, perhaps with a picture half written."""
        here, there = self.root / str(self.boots), self.root / str(self.boots + 1)
        shutil.copytree(here, there)
        self.gallery.database.close()
        if leaves:
            (there / "pictures" / f".{'a' * 32}.part").write_bytes(b"half")
            (there / "pictures" / f"{'b' * 32}.png").write_bytes(b"without a row")
        self.boots += 1
        self.open()

    @invariant()
    def images_are_the_models(self):
        if not self.boots and not hasattr(self, "gallery"):
            return
        found = self.gallery.page(1000)
        assert [(one.id, one.client, one.created) for one in reversed(found)] == [
            (id, kept.client, kept.created) for id, kept in self.images.items()
        ]
        assert sorted(os.listdir(self.gallery.folder)) == [f"{id}.png" for id in self.images]
        assert self.gallery.size() == sum(kept.bytes for kept in self.images.values())
        assert self.gallery.size() <= self.bound or len(found) == 1

    @invariant()
    def jobs_are_the_models(self):
        if not hasattr(self, "table"):
            return
        found = {job.id: job for job in self.table.page(1000)}
        assert sorted(found) == sorted(self.jobs)
        for id, job in self.jobs.items():
            assert (found[id].status, found[id].ended) == (job.status, job.ended)
            assert bool(self.table.uploads(id)) == (job.status == "open")
        waiting = [id for id, job in self.jobs.items() if job.status == "open"]
        assert [job.id for job in self.table.open()] == waiting

    @invariant()
    def pages_are_cuts_of_the_whole(self):
        if not hasattr(self, "gallery"):
            return
        for owner in CLIENTS:
            found, before = [], None
            while page := self.gallery.page(2, before, owner):
                found += page
                before = page[-1].id
            assert found == [one for one in self.gallery.page(1000) if one.client == owner]


TestStore = StoreMachine.TestCase
TestStore.settings = hypothesis_settings(max_examples=20, stateful_step_count=20, deadline=None)


# --- killed ---------------------------------------------------------------------------------


def write(folder, said):
    """Three threads that write jobs and pictures as fast as they can, and say what is done."""
    database = Database(folder)
    gallery, table = Gallery(database, 200_000, 1e9), JobTable(database)

    def work():
        while True:
            job = table.accept("ann", {}, {"image": "x" * 5000}, 2, 10).id
            os.write(said, f"{job}\n".encode())
            for place in range(2):
                also = partial(keep, table, job, place)
                kept = gallery.add(random_image(64), SETTINGS, "ann", also)
                os.write(said, f"{job} {place} {kept.id}\n".encode())

    for _ in range(3):
        threading.Thread(target=work).start()


def test_what_was_said_is_there_after_kill_9(tmp_path):
    accepted, drawn = set(), {}
    for i in range(4):
        hears, says = os.pipe()
        writer = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, says))
        writer.start()
        os.close(says)
        with open(hears) as lines:
            heard = [lines.readline() for _ in range(9 * (i + 1))]
            os.kill(writer.pid, signal.SIGKILL)
            for line in [*heard, *lines.read().split("\n")[:-1]]:
                job, *words = line.split()
                accepted.add(job)
                if words:
                    drawn[job, int(words[0])] = words[1]
        writer.join()
        gallery = gallery_of(tmp_path, most_bytes=200_000, most_seconds=1e9)
        table = JobTable(gallery.database)
        jobs = {job.id: job for job in table.page(100_000)}
        assert accepted <= set(jobs)
        assert all(jobs[job].ended[place] == id for (job, place), id in drawn.items())
        assert all((len(job.ended) == 2) == (job.status == "done") for job in jobs.values())
        found = {one.id for one in gallery.page(100_000)}
        assert {name.removesuffix(".png") for name in os.listdir(gallery.folder)} == found
        for id in found:
            with Image.open(io.BytesIO(gallery.png(id))) as image:
                image.load()
        recorded = [id for job in jobs.values() for id in job.ended.values()]
        assert len(set(recorded)) == len(recorded) and found <= set(recorded)
        gallery.database.close()
    assert len(drawn) > 10


def test_on_a_full_disk_deleting_and_cancelling_work(tmp_path):
    script = Path(__file__).with_name("full_disk.py")
    command = ["unshare", "-rm", sys.executable, script, tmp_path]
    missing = shutil.which("unshare") is None
    if missing or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs leave to mount a small disk")
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "held\n", done.stderr
