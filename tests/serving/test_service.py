"""The service behind the interfaces: who is taken in, who comes next, and until when."""

import json
import math
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala.errors import UserError
from koala.generation import Late, Pass, load
from koala.serving.admission import Admission, Busy, ThroughputEstimate
from koala.serving.fair_queue import FairQueue, QueueEntry
from koala.serving.image_request import ImageRequest
from koala.serving.service import Service
from koala.serving.settings import Limits
from toy import toy_pipeline

SIZE = "16x16"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load(toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala"), "cpu")


@pytest.fixture
def serve(pipeline):
    """Makes started services, which end with the test."""
    made = []

    def start(**limits) -> Service:
        made.append(Service(pipeline, Limits(**{"max_batch": 2, "steps": 1000, **limits})))
        made[-1].start()
        return made[-1]

    yield start
    for service in made:
        service.close()


def order(prompt="a", **asked) -> ImageRequest:
    return ImageRequest(prompt, **{"size": SIZE, "steps": 2, "seed": 0, "guidance": 1.0, **asked})


class Held:
    """A picture that stays at its first step, and the engine with it, until `let_go`."""

    def __init__(self, service: Service, **asked) -> None:
        self.at_step, self.free = threading.Event(), threading.Event()
        self.submission = service.submit(order(**{"steps": 3, **asked}), self._hold)
        assert self.at_step.wait(60)

    def _hold(self, event) -> None:
        if event.kind == "step":
            self.at_step.set()
            self.free.wait(60)

    def let_go(self) -> None:
        self.free.set()


# --- requests -------------------------------------------------------------------------------


@given(
    st.builds(
        ImageRequest, st.text(), steps=st.integers(), guidance=st.floats(allow_nan=False),
        size=st.none() | st.text(), seed=st.none() | st.integers(),
        image=st.none() | st.binary(), mask=st.none() | st.binary(),
        loras=st.lists(st.tuples(st.text(), st.floats(allow_nan=False))).map(tuple),
        deadline=st.none() | st.floats(allow_nan=False),
    )
)  # fmt: skip
def test_a_request_survives_json(made):
    assert ImageRequest.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="unknown fields of a request: colour"):
        ImageRequest.from_dict({"prompt": "a", "colour": "red"})


# --- fairness -------------------------------------------------------------------------------


class Line:
    """A queue of pictures, served one by one as the engine would."""

    def __init__(self, patience: float = 30.0) -> None:
        self.now = 0.0
        self.fair_queue = FairQueue(patience, lambda: self.now)
        self.tickets: list[SimpleNamespace] = []
        self.number = 0

    def join(self, client: str, number: int = 1, priority: int = 0, work: float = 1.0) -> None:
        for _ in range(number):
            place = QueueEntry(client, priority, work, self.now)
            self.fair_queue.arrive(place)
            self.tickets.append(SimpleNamespace(tag=place, number=self.number))
            self.number += 1

    def take(self, number: int) -> str:
        """The clients of the next pictures, which are drawn at once."""
        taken = ""
        for _ in range(number):
            ticket = min(self.tickets, key=self.fair_queue.rank)
            self.tickets.remove(ticket)
            self.fair_queue.start(ticket.tag)
            self.fair_queue.leave(ticket.tag)
            taken += ticket.tag.client
        return taken


def test_clients_take_turns_however_much_each_sends():
    line = Line()
    line.join("a", 5)
    line.join("b", 2)
    line.join("c", 1)
    assert line.take(8) == "abcabaaa"


def test_who_asks_for_more_work_has_fewer_turns():
    line = Line()
    line.join("a", 3, work=4.0)
    line.join("b", 8, work=1.0)
    assert line.take(11) == "abbbbabbbba"


def test_who_comes_back_has_saved_up_nothing():
    line = Line()
    line.join("a", 9)
    assert line.take(5) == "aaaaa"
    line.join("b", 4)
    assert line.take(8) == "babababa"


def test_lower_priorities_wait_but_not_for_ever():
    line = Line(patience=10)
    line.join("b", 2, priority=1)
    line.join("a", 3)
    assert line.take(2) == "aa"
    line.now = 10.0
    line.join("a", 9)
    assert "b" in line.take(2)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5)), min_size=1, max_size=40))
def test_nobody_who_waits_is_more_than_one_image_behind(joined):
    """Work given to two clients that both wait differs by at most their largest pictures."""
    line = Line()
    for client, work in joined:
        line.join(client, work=work)
    given_work = dict.fromkeys("abc", 0)
    while line.tickets:
        foreseen = line.fair_queue.order(line.tickets)[0]
        waiting = {ticket.tag.client for ticket in line.tickets}
        for one in waiting:
            for other in waiting:
                assert abs(given_work[one] - given_work[other]) <= 5
        before = list(line.tickets)
        client = line.take(1)
        (gone,) = [ticket for ticket in before if ticket not in line.tickets]
        given_work[client] += gone.tag.work
        assert gone is foreseen


# --- admission ------------------------------------------------------------------------------


def request(pixels: int = 100):
    return SimpleNamespace(pixels=pixels)


@pytest.mark.parametrize(
    ("reason", "limits"),
    [
        ("queue_full", {"queue": 2}),
        ("client_queue_full", {"client_queue": 2}),
        ("memory", {"pixels": 250}),
    ],
)
def test_each_limit_has_its_name_and_a_image_that_goes_makes_room(reason, limits):
    admission = Admission(Limits(**limits))
    for _ in range(2):
        admission.admit("a", [request()], 100.0)
    with pytest.raises(Busy) as refused:
        admission.admit("a", [request()], 100.0)
    assert refused.value.reason == reason
    admission.release("a", request(), 100.0)
    admission.admit("a", [request()], 100.0)
    assert admission.images == 2


def test_one_clients_queue_is_not_anothers():
    admission = Admission(Limits(client_queue=1))
    for client in "abc":
        admission.admit(client, [request()], 1.0)
    assert admission.images == 3


def test_what_can_never_fit_is_a_mistake_and_not_a_matter_of_time():
    with pytest.raises(UserError, match="exceed the server's capacity"):
        Admission(Limits(pixels=250)).admit("a", [request()] * 3, 1.0)


def test_how_long_to_wait_follows_from_the_pace_and_from_what_has_to_go():
    admission = Admission(Limits(queue=4))
    admission.throughput.update(Pass(images=1, pixels=100, seconds=2.0))
    admission.admit("a", [request()] * 4, 4 * 500.0)
    with pytest.raises(Busy) as refused:
        admission.check("b", 2)
    assert refused.value.retry_after == pytest.approx(20.0)  # two of four pictures of 10 s each
    admission.progress(1000.0)
    with pytest.raises(Busy) as refused:
        admission.check("b", 2)
    assert refused.value.retry_after == pytest.approx(10.0)


def test_the_throughput_estimate_follows_recent_passes():
    throughput = ThroughputEstimate()
    assert throughput.seconds(1e9) == 1.0  # no passes yet: the shortest
    for seconds in (1.0, 3.0):
        for _ in range(500):
            throughput.update(Pass(1, 100, seconds))
    assert throughput.seconds(1000) == pytest.approx(30.0, rel=1e-3)


# --- the service ----------------------------------------------------------------------------


def test_images_of_an_order_are_the_pipelines_own(serve, pipeline):
    result = serve().submit(order(number=3, seed=4)).result()
    own = pipeline("a", size=SIZE, steps=2, guidance=1.0, number=3, seed=4)
    assert result.settings == own.settings
    for image, other in zip(result.images, own.images, strict=True):
        assert max(abs(a - b) for a, b in zip(image.tobytes(), other.tobytes(), strict=True)) <= 1


def test_every_image_tells_its_way(serve):
    seen = []
    service = serve()
    submission = service.submit(order(number=2, steps=3), seen.append)
    submission.result()
    until_idle(service)
    for index in (0, 1):
        told = [(event.kind, event.done, event.steps) for event in seen if event.index == index]
        assert told == [("started", 0, 3), *(("step", n, 3) for n in (1, 2, 3)), ("picture", 3, 3)]


def until_idle(service: Service) -> None:
    eventually(lambda: metric(service, "active_pictures") + metric(service, "queue_pictures") == 0)


def metric(service: Service, name: str) -> float:
    return service.metrics.registry.get_sample_value(f"koala_{name}")


def eventually(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_cancelled_image_frees_its_place_at_the_next_step(serve):
    service = serve(max_batch=1)
    held, seen = Held(service, steps=900), []
    waits = service.submit(order(steps=1), seen.append)
    held.submission.cancel()
    held.let_go()
    waits.result()
    until_idle(service)
    # the step at which it was held, and the other's only one
    assert metric(service, "batch_pictures_count") == 2
    with pytest.raises(CancelledError):
        held.submission.result()


def test_positions_count_what_is_ahead(serve):
    service = serve(max_batch=1)
    held = Held(service)
    others = [service.submit(order(number=2, client=client)) for client in "ab"]
    assert held.submission.position() == 0
    assert [other.position() for other in others] == [0, 1]
    batch = service.submit(order(client="c", priority=1))
    assert [one.position() for one in (*others, batch)] == [0, 1, 4]
    held.let_go()
    others[1].result()
    assert others[1].position() == 0


def test_limits_are_those_of_images_that_are_there(serve):
    service = serve(max_batch=1, client_queue=2)
    held = Held(service, client="a")
    other = service.submit(order(client="a"))
    with pytest.raises(Busy) as refused:
        service.submit(order(client="a"))
    assert refused.value.reason == "client_queue_full" and refused.value.retry_after >= 1
    other.cancel()
    assert service.submit(order(client="a", number=1)) is not None
    held.let_go()


def test_a_deadline_ends_what_waits_and_what_is_on_its_way(serve):
    service = serve(max_batch=1)
    held = Held(service, steps=500, deadline=2.0)
    waits = service.submit(order(deadline=0.2))
    time.sleep(2.1)
    held.let_go()
    for late in (held.submission, waits):
        with pytest.raises(Late, match="deadline"):
            late.result()
    assert (
        service.metrics.registry.get_sample_value("koala_errors_total", {"reason": "deadline"}) == 2
    )


@pytest.mark.parametrize("deadline", [0, -1, math.nan, math.inf, True, "soon"])
def test_deadlines_that_are_none_are_refused(serve, deadline):
    with pytest.raises(UserError, match="deadline is"):
        serve().requests(order(deadline=deadline))


def test_draining_finishes_what_is_there_and_takes_no_more(serve):
    service = serve()
    submission = service.submit(order(number=3, steps=5))
    assert service.drain(60) and not service.ready
    assert len(submission.result().images) == 3
    with pytest.raises(Busy) as refused:
        service.submit(order())
    assert refused.value.reason == "draining"


def test_draining_has_an_end(serve):
    service = serve(max_batch=1)
    held = Held(service, steps=900)
    threading.Timer(0.3, held.let_go).start()
    waits = service.submit(order(steps=900))
    assert not service.drain(0.1)
    for submission in (held.submission, waits):
        with pytest.raises(CancelledError):
            submission.result()


def test_before_it_is_warm_it_takes_nothing(pipeline):
    with pytest.raises(Busy) as refused:
        Service(pipeline, Limits()).submit(order())
    assert refused.value.reason == "starting"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_died_is_no_server_that_is_alive(serve):
    service = serve()

    def die(event) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        service.submit(order(), die).result()
    eventually(lambda: not service.alive)
    with pytest.raises(Busy):
        service.submit(order())
    assert metric(service, "active_pictures") == 0


def test_images_that_are_gone_leave_their_room_to_others(serve):
    service = serve(queue=16, pixels=16 * 16 * 16)  # just enough for one round
    for _ in range(3):
        submissions = [service.submit(order(number=2, client=f"client {i}")) for i in range(8)]
        for submission in submissions[::2]:
            submission.cancel()
        for submission in submissions[1::2]:
            submission.result()
        until_idle(service)
