"""Jobs and the gallery over HTTP: followed, cancelled, late, too many, and through crashes."""

import asyncio
import base64
import contextlib
import errno
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import httpx2
import pytest
from PIL import Image

from koala.generation import load, read_settings
from koala.serving.jobs.database import Database
from koala.serving.jobs.subscribers import Subscriber
from koala.serving.jobs.table import JobLimits, JobTable
from koala.serving.settings import Limits
from stepping import assert_near
from toy import toy_pipeline
from toy_server import gated, running

SIDE = 16
ASKED = {"prompt": "a red fox", "size": "16x16", "steps": 3, "seed": 5}
ONE_AT_A_TIME = Limits(max_batch=8, queue=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala")


@pytest.fixture(scope="module")
def pipeline(folder):
    return load(folder, "cpu")


@pytest.fixture
def gate(pipeline):
    """While it is closed (cleared), no step is taken."""
    with gated(pipeline) as gate:
        yield gate


class Client(httpx2.Client):
    """A client that expects what it gets."""

    def ok(self, method, path, status=200, **more):
        answer = self.request(method, path, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    def submit(self, **asked):
        return self.ok("POST", "/v1/jobs", 202, json={**ASKED, **asked})

    def get_job(self, id):
        return self.ok("GET", f"/v1/jobs/{id}")

    def cancel(self, id):
        return self.ok("POST", f"/v1/jobs/{id}/cancel")

    def until(self, id, *statuses):
        for _ in range(600):
            job = self.get_job(id)
            if job["status"] in statuses:
                return job
            time.sleep(0.05)
        raise AssertionError(f"still {job['status']}")

    def in_service(self):
        """Images queued or running in the service."""
        names = ("koala_queue_pictures", "koala_active_pictures")
        lines = dict(line.split(" ")[:2] for line in self.get("/metrics").text.splitlines())
        return sum(float(lines[name]) for name in names)

    def at_rest(self, id):
        """Whether a job stands still with an image in the service."""
        before = self.get_job(id)
        time.sleep(0.2)
        return self.in_service() == 1 and self.get_job(id) == before

    def end(self, id):
        return self.until(id, "done", "failed", "cancelled")

    def events(self, id):
        """(name, data) of a job's events as they come."""
        with self.stream("GET", f"/v1/jobs/{id}/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            name = None
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def serving(pipeline, data, **told):
    with (
        running(pipeline, data, **told) as server,
        Client(base_url=server.url, timeout=60) as client,
    ):
        client.jobs, client.gallery_writer = server.app.state.jobs, server.app.state.gallery_writer
        yield client


@pytest.fixture
def client(pipeline, gate, tmp_path):
    with serving(pipeline, tmp_path / "data") as client:
        yield client


@pytest.fixture
def one_at_a_time(pipeline, gate, tmp_path):
    """The client of a server whose service takes one image of jobs at a time."""
    with serving(pipeline, tmp_path / "data", limits=ONE_AT_A_TIME) as client:
        yield client


@pytest.fixture(scope="module")
def empty(pipeline, tmp_path_factory):
    """One server for all that is refused."""
    with serving(pipeline, tmp_path_factory.mktemp("data")) as client:
        yield client


def eventually(holds):
    """Waits until something holds that follows from what was seen, but not at once."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def subscribers():
    gc.collect()
    return sum(isinstance(each, Subscriber) for each in gc.get_objects())


def png(side=SIDE, colour="teal"):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# --- one job --------------------------------------------------------------------------------


def test_a_job_becomes_the_images_that_the_pipeline_draws(client, pipeline):
    job = client.submit(n=2, negative_prompt="blur", priority="batch")
    assert job["object"] == "job" and job["status"] in ("queued", "running")
    assert job["request"]["n"] == 2 and job["request"]["priority"] == "batch"
    job = client.end(job["id"])
    assert job["status"] == "done" and job["error"] is None and job["position"] == 0
    assert job["progress"] == {"done": 6, "total": 6}
    assert job["created"] <= job["started"] <= job["finished"]
    alone = pipeline("a red fox", size="16x16", steps=3, seed=5, number=2, negative_prompt="blur")
    assert [one["index"] for one in job["pictures"]] == [0, 1]
    for one, image, settings in zip(job["pictures"], alone.images, alone.settings, strict=True):
        answer = client.get(one["url"])
        assert answer.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(answer.content)) as found:
            assert_near(found, image)
        assert read_settings(io.BytesIO(answer.content)) == settings
        assert one["settings"] == json.loads(json.dumps(settings.__dict__))
        answer = client.get(one["thumbnail"])
        with Image.open(io.BytesIO(answer.content)) as found:
            assert answer.headers["content-type"] == "image/webp" and found.size == (16, 16)


def test_its_request_can_be_sent_again(client):
    first = client.end(client.submit(guidance=2.0, scheduler="ddim", deadline=600.0)["id"])
    again = client.ok("POST", "/v1/jobs", 202, json=first["request"])
    again = client.end(again["id"])
    assert again["request"] == first["request"]
    assert again["pictures"][0]["settings"] == first["pictures"][0]["settings"]


def test_a_random_seed_is_chosen_when_the_job_is_taken(client):
    job = client.submit(seed=None)
    seed = job["request"]["seed"]
    assert isinstance(seed, int)
    assert client.end(job["id"])["pictures"][0]["settings"]["seed"] == seed


def test_images_and_masks_are_given_as_base64_or_data_urls_and_not_kept(client, pipeline):
    data = f"data:image/png;base64,{png(colour='white')}"
    job = client.end(client.submit(image=png(), mask=data, strength=0.5, size=None)["id"])
    assert job["status"] == "done" and "image" not in job["request"]
    settings = job["pictures"][0]["settings"]
    assert settings["image"] and settings["mask"] and settings["strength"] == 0.5
    assert client.jobs.table.uploads(job["id"]) == {}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": None}, "prompt"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "at most"),
        ({"size": "17x16"}, "size 17x16"),
        ({"scheduler": "eulre"}, "unknown scheduler 'eulre'"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"image": "no base64!"}, "image is not valid base64"),
        ({"image": "data:image/png,abc"}, "data: URL without base64"),
        ({"image": "QUJD"}, "image cannot be read"),
        ({"mask": png()}, "a mask needs an image"),
        ({"strength": 0.5}, "strength 0.5 has no effect"),
        ({"lora": [{"name": "x"}]}, "no LoRA folder"),
        ({"priority": "first"}, "priority"),
        ({"deadline": 0}, "deadline"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_jobs_are_refused_by_name_and_leave_nothing(empty, asked, says):
    answer = empty.post("/v1/jobs", json={**ASKED, **asked})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert empty.ok("GET", "/v1/jobs") == {"object": "list", "data": []}


def test_unknown_ids_are_404_and_bad_pages_400(empty):
    for path in ("jobs/x", "jobs/x/events", f"gallery/{'a' * 32}", "gallery/..%2f..%2fx/image"):
        assert empty.get(f"/v1/{path}").status_code == 404
    assert empty.delete(f"/v1/gallery/{'a' * 32}").status_code == 404
    assert empty.post("/v1/jobs/x/cancel").status_code == 404
    for query in ("limit=0", "limit=x", "limit=1000", "before=1", "before=%00"):
        for what in ("jobs", "gallery"):
            answer = empty.get(f"/v1/{what}?{query}")
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "invalid_value"


def test_what_a_list_does_not_filter_by_is_refused(empty):
    for what, names in {"jobs": "limit, before", "gallery": "limit, before, search"}.items():
        answer = empty.get(f"/v1/{what}?limit=2&status=queued")
        said = f"unknown parameter 'status': allowed are {names}"
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, said)
    deleted = empty.delete("/v1/jobs/x")
    assert deleted.status_code == 405
    assert "a job is cancelled by POST to its /cancel" in deleted.json()["error"]["message"]


# --- followed -------------------------------------------------------------------------------


def test_a_subscriber_receives_everything_in_order(client, gate):
    gate.clear()
    job = client.submit(n=2)
    events = client.events(job["id"])
    name, first = next(events)
    assert name == "status" and first["id"] == job["id"]
    threading.Timer(0.2, gate.set).start()
    heard = list(events)
    names = [name for name, _ in heard]
    assert names[-1] == "end" and heard[-1][1] == client.get_job(job["id"])
    images = [data for name, data in heard if name == "picture"]
    assert sorted(data["index"] for data in images) == [0, 1]
    assert {data["picture"]["id"] for data in images} == {
        one["id"] for one in heard[-1][1]["pictures"]
    }
    progress = [data["done"] for name, data in heard if name == "progress"]
    assert progress == sorted(progress) and all(done <= 6 for done in progress)
    preview = next(data for name, data in heard if name == "preview")
    with Image.open(io.BytesIO(base64.b64decode(preview["b64_json"]))) as image:
        assert image.format == "WEBP" and image.size == (2, 2)


def test_a_late_subscriber_receives_the_state_and_the_end(client):
    job = client.end(client.submit()["id"])
    assert list(client.events(job["id"])) == [("status", job), ("end", job)]


def test_two_can_subscribe_and_one_can_leave(client, gate):
    gate.clear()
    job = client.submit()
    before = subscribers()
    stays, leaves = client.events(job["id"]), client.events(job["id"])
    assert next(stays)[0] == next(leaves)[0] == "status"
    assert subscribers() == before + 2
    leaves.close()
    eventually(lambda: subscribers() == before + 1)
    gate.set()
    assert list(stays)[-1][0] == "end"
    assert client.end(job["id"])["status"] == "done"


def test_silence_is_filled_with_comments(client, gate, monkeypatch):
    monkeypatch.setattr("koala.serving.api.streams.KEEP_ALIVE", 0.1)
    gate.clear()
    job = client.submit()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        comments = (line for line in answer.iter_lines() if line.startswith(":"))
        assert next(comments) and next(comments)
    gate.set()
    client.end(job["id"])


def test_a_slow_subscriber_misses_stale_updates_and_nothing_else():
    async def follow():
        subscriber = Subscriber()
        for i in range(1000):
            subscriber.notify("preview", i % 2, i)
            subscriber.notify("progress")
            if i in (300, 600):
                subscriber.notify("picture", i)
        subscriber.notify("end")
        first = await subscriber.updates()
        subscriber.notify("progress")
        return first, await subscriber.updates()

    first, second = asyncio.run(asyncio.wait_for(follow(), 10))
    images = [("picture", 300, None), ("picture", 600, None)]
    previews = [("preview", 0, 998), ("preview", 1, 999)]
    assert first == [*images, *previews, ("progress", 0, None), ("end", 0, None)]
    assert second == [("progress", 0, None)]


def test_a_queued_job_reports_its_position(one_at_a_time, gate):
    client = one_at_a_time
    gate.clear()
    jobs = [client.submit(n=n, steps=2) for n in (1, 2, 2)]
    client.until(jobs[0]["id"], "running")
    assert [client.get_job(job["id"])["position"] for job in jobs] == [0, 0, 2]
    events = client.events(jobs[2]["id"])
    assert next(events)[1]["position"] == 2
    gate.set()
    heard = [data["position"] for name, data in events if name == "progress"]
    assert heard == sorted(heard, reverse=True) and heard[-1] == 0


# --- cancelled, late, too many --------------------------------------------------------------


def test_cancelling_a_running_and_a_queued_job_frees_their_places(one_at_a_time, gate):
    client = one_at_a_time
    gate.clear()
    running, queued, last = (client.submit(n=2, steps=50) for _ in range(3))
    client.until(running["id"], "running")
    for job in (running, queued):
        assert client.cancel(job["id"])["status"] == "cancelled"
        again = client.cancel(job["id"])
        assert again["status"] == "cancelled" and again["finished"] >= again["created"]
        assert (again["started"] is None) == (job is queued)
    gate.set()
    assert client.end(last["id"])["status"] == "done"
    assert client.cancel(last["id"])["status"] == "done"
    assert client.get_job(running["id"])["pictures"] == []
    assert list(client.events(queued["id"]))[-1][1]["status"] == "cancelled"
    eventually(lambda: client.in_service() == 0)


def test_a_job_past_its_deadline_fails_whether_it_waits_or_is_drawn(one_at_a_time, gate):
    client = one_at_a_time
    gate.clear()
    running, queued = (client.submit(deadline=seconds) for seconds in (3.0, 0.3))
    job = client.end(queued["id"])
    assert job["status"] == "failed" and job["error"]["code"] == "deadline"
    eventually(lambda: time.time() > running["created"] + 3)
    gate.set()
    assert client.end(running["id"])["error"]["code"] == "deadline"


def test_more_jobs_than_the_service_holds_are_all_drawn(pipeline, gate, tmp_path):
    limits = Limits(max_batch=2, queue=4, client_queue=4)
    with serving(pipeline, tmp_path, limits=limits) as client:
        gate.clear()
        client.jobs.table.limits = JobLimits(jobs=12)
        jobs = [client.submit(n=2, seed=seed) for seed in range(12)]
        answer = client.post("/v1/jobs", json=ASKED)
        assert answer.status_code == 429 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "queue_full"
        client.until(jobs[0]["id"], "running")
        # others still find room while the jobs wait
        waits = threading.Thread(
            target=client.ok, args=("POST", "/v1/images/generations"), kwargs={"json": ASKED}
        )
        waits.start()
        gate.set()
        waits.join(60)
        ends = [client.end(job["id"]) for job in jobs]
        assert {job["status"] for job in ends} == {"done"}
        seeds = [one["settings"]["seed"] for job in ends for one in job["pictures"]]
        assert seeds == [seed + i for seed in range(12) for i in (0, 1)]


def test_the_urgent_comes_before_the_patient(one_at_a_time, gate):
    client = one_at_a_time
    gate.clear()
    first, patient, urgent = (
        client.submit(priority=priority) for priority in ("batch", "batch", "interactive")
    )
    client.until(first["id"], "running")
    assert [client.get_job(job["id"])["position"] for job in (urgent, patient)] == [0, 1]
    gate.set()
    ends = [client.end(job["id"])["finished"] for job in (first, urgent, patient)]
    assert ends == sorted(ends)


# --- lists, owners, the gallery -------------------------------------------------------------


def test_lists_are_newest_first_in_pages(client):
    jobs = [client.end(client.submit(seed=seed)["id"]) for seed in range(5)]
    for what, ids in (
        ("jobs", [job["id"] for job in jobs]),
        ("gallery", [job["pictures"][0]["id"] for job in jobs]),
    ):
        found, before = [], ""
        while page := client.ok("GET", f"/v1/{what}?limit=2{before}")["data"]:
            found += [one["id"] for one in page]
            before = f"&before={found[-1]}"
        assert found == ids[::-1]


def test_a_deleted_image_is_gone_from_gallery_and_job(client):
    job = client.end(client.submit(n=2)["id"])
    first, second = job["pictures"]
    assert client.ok("GET", f"/v1/gallery/{first['id']}")["settings"] == first["settings"]
    assert client.ok("DELETE", f"/v1/gallery/{first['id']}")["deleted"]
    for path in ("", "/image", "/thumbnail"):
        assert client.get(f"/v1/gallery/{first['id']}{path}").status_code == 404
    assert client.get_job(job["id"])["pictures"] == [second]
    assert [one["id"] for one in client.ok("GET", "/v1/gallery")["data"]] == [second["id"]]


def test_synchronous_images_are_in_the_gallery_too(client):
    client.ok("POST", "/v1/images/generations", json=ASKED)
    client.gallery_writer.flush()
    (found,) = client.ok("GET", "/v1/gallery")["data"]
    assert found["settings"]["prompt"] == ASKED["prompt"]


def test_with_keys_everybody_sees_their_own(pipeline, gate, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a" * 20 + "\n" + "b" * 20 + "\n")
    with serving(pipeline, tmp_path / "data", api_key_file=keys) as client:
        assert client.post("/v1/jobs", json=ASKED).status_code == 401
        ann, bob = ({"Authorization": f"Bearer {key * 20}"} for key in "ab")
        id = client.ok("POST", "/v1/jobs", 202, json=ASKED, headers=ann)["id"]
        client.headers.update(ann)
        (one,) = client.end(id)["pictures"]
        client.headers.update(bob)
        for path in (f"jobs/{id}", f"jobs/{id}/events", f"gallery/{one['id']}"):
            assert client.get(f"/v1/{path}").status_code == 404
        for path in ("image", "thumbnail"):
            assert client.get(f"/v1/gallery/{one['id']}/{path}").status_code == 404
        assert client.post(f"/v1/jobs/{id}/cancel").status_code == 404
        assert client.delete(f"/v1/gallery/{one['id']}").status_code == 404
        assert client.ok("GET", "/v1/jobs")["data"] == client.ok("GET", "/v1/gallery")["data"] == []


# --- restarts and crashes -------------------------------------------------------------------


def test_what_a_stop_leaves_open_is_drawn_after_the_next_start(pipeline, gate, tmp_path):
    with serving(pipeline, tmp_path) as client:
        gate.clear()
        jobs = [client.submit(n=2, seed=seed) for seed in range(10)]
        client.until(jobs[0]["id"], "running")
        client.jobs.service.drain(0.01)
        assert client.post("/v1/jobs", json=ASKED).status_code == 503
        gate.set()
    with serving(pipeline, tmp_path) as client:
        ends = [client.end(job["id"]) for job in jobs]
        assert {job["status"] for job in ends} == {"done"}
        assert len(client.ok("GET", "/v1/gallery?limit=200")["data"]) == 20


def test_after_a_crash_only_what_had_no_end_is_drawn_and_with_the_same_seed(
    pipeline, gate, tmp_path
):
    here, there = tmp_path / "here", tmp_path / "there"
    with serving(pipeline, here, limits=ONE_AT_A_TIME) as client:
        job = client.submit(n=3, seed=None, steps=20)
        eventually(lambda: client.get_job(job["id"])["pictures"])
        gate.clear()
        eventually(lambda: client.at_rest(job["id"]))
        other, cancelled = client.submit(), client.submit()
        client.cancel(cancelled["id"])
        before = client.get_job(job["id"])
        shutil.copytree(here, there)  # what a crash leaves: the files of this moment
        gate.set()
    with serving(pipeline, there) as client:
        after, second = client.end(job["id"]), client.end(other["id"])
        assert [one["status"] for one in (after, second)] == ["done", "done"]
        assert client.get_job(cancelled["id"])["status"] == "cancelled"
        assert after["pictures"][: len(before["pictures"])] == before["pictures"]
        seeds = [one["settings"]["seed"] for one in after["pictures"]]
        assert seeds == [job["request"]["seed"] + i for i in range(3)]
        assert len(client.ok("GET", "/v1/gallery")["data"]) == 4


def test_a_disk_that_is_full_for_a_while_loses_no_job(client, monkeypatch):
    monkeypatch.setattr("koala.serving.jobs.jobs.DISK_RETRY", 0.1)
    plain, full = os.fsync, iter([True, True, True])

    def fsync(handle):
        if next(full, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    job = client.end(client.submit(n=2)["id"])
    assert job["status"] == "done" and next(full, None) is None
    files = os.listdir(client.jobs.gallery.folder)
    assert sorted(files) == sorted(f"{one['id']}.png" for one in job["pictures"])


def serve_until_killed(folder, data, port):
    with running(load(folder, "cpu"), data) as server:
        port.send(server.url)
        threading.Event().wait()


def test_accepted_jobs_are_drawn_exactly_once_through_kill_9(folder, tmp_path):
    """A server in a process of its own, killed three times while it is asked for jobs."""
    context = multiprocessing.get_context("forkserver")
    accepted = {}
    for i in range(4):
        hears, says = context.Pipe()
        server = context.Process(target=serve_until_killed, args=(folder, tmp_path, says))
        server.start()
        try:
            with Client(base_url=hears.recv(), timeout=60) as client:
                for _ in range(4 + i):
                    job = client.submit(n=2, seed=None, steps=4)
                    accepted[job["id"]] = job["request"]["seed"]
                if i in (1, 2):  # killed with some images finished, else with none
                    eventually(lambda: client.ok("GET", "/v1/gallery")["data"])
                if i == 3:
                    ends = {id: client.end(id) for id in accepted}
                    images = client.ok("GET", "/v1/gallery?limit=200")["data"]
        finally:
            os.kill(server.pid, signal.SIGKILL)
            server.join()
    assert {job["status"] for job in ends.values()} == {"done"} and len(ends) == 4 + 5 + 6 + 7
    for id, job in ends.items():
        seeds = [one["settings"]["seed"] for one in job["pictures"]]
        assert seeds == [accepted[id], accepted[id] + 1]
    drawn = [one["id"] for job in ends.values() for one in job["pictures"]]
    assert len(set(drawn)) == len(drawn)
    assert {one["id"] for one in images} <= set(drawn)
    assert set(os.listdir(tmp_path / "pictures")) == {f"{id}.png" for id in drawn}


def test_a_job_that_the_model_no_longer_allows_fails_by_name(pipeline, tmp_path):
    database = Database(tmp_path)
    request = {"prompt": "a", "size": "17x17", "seed": 1, "priority": 0, "loras": [], "number": 1}
    id = JobTable(database).accept("ann", request, {}, 1, 3).id
    database.close()
    with serving(pipeline, tmp_path) as client:
        job = client.end(id)
        assert job["status"] == "failed" and job["error"]["code"] == "invalid_value"
        assert "17x17" in job["error"]["message"]
