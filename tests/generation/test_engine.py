"""The step engine: requests of every kind side by side, none of which sees the others."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError
from concurrent.futures import wait as wait_for

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from koala.errors import Failure, UserError
from koala.generation import Engine, Late, Ticket, load
from koala.generation.denoise import BatchRow, evaluate
from stepping import assert_near, stepped
from toy import TOKENS
from toy_lora import toy_base, toy_lora

SIDE = 16  # pixels: the smallest picture there is
KINDS = [  # requests that differ in all a row can differ in, of one shape
    {"prompt": "a red fox", "steps": 3},
    {"prompt": "an owl", "steps": 5, "guidance": 1.0},
    {"prompt": "x", "steps": 4, "guidance": 6.0, "negative_prompt": "blur"},
    {"prompt": "two", "steps": 2, "scheduler": "euler-a"},
    {"prompt": "three", "steps": 5, "scheduler": "dpm++2m", "guidance_until": 0.5},
    {"prompt": "four", "steps": 3, "scheduler": "lcm", "guidance": 1.5},
    {"prompt": "five", "steps": 4, "scheduler": "ddim"},
    {"prompt": "six", "steps": 6, "image": Image.new("RGB", (SIDE, SIDE), "teal"), "strength": 0.5},
]


@pytest.fixture(scope="module")
def pipeline(toy_koala):
    return load(toy_koala, "cpu")


@pytest.fixture(scope="module")
def alone(pipeline):
    """The last latents of every kind of request, each drawn by itself."""
    return [latents_alone(pipeline, request) for request in kinds(pipeline)]


@pytest.fixture
def watched(pipeline, monkeypatch):
    """The pipeline, with the sizes of its batches in `batches`."""
    plain, batches = pipeline.predict, []

    def predict(x, timesteps, condition):
        batches.append(len(x))
        return plain(x, timesteps, condition)

    monkeypatch.setattr(pipeline, "predict", predict)
    return pipeline, batches


def request_of(pipeline, seed=0, prompt="a", size=(SIDE, SIDE), **asked):
    (request,) = pipeline.requests(prompt, seed=seed, size=size, **asked)
    return request


def kinds(pipeline):
    return [request_of(pipeline, seed=i, **asked) for i, asked in enumerate(KINDS)]


@torch.inference_mode()
def latents_alone(pipeline, request):
    return stepped(pipeline, [pipeline.begin(request)])


def drawn_alone(pipeline, request):
    return pipeline.draw([request]).images[0]


def run(engine):
    while engine.turn():
        pass


def run_together(engine, requests):
    """Their tickets, all ended."""
    tickets = [engine.submit(request) for request in requests]
    run(engine)
    return tickets


def bytes_of(images):
    return [image.tobytes() for image in images]


# --- rows -----------------------------------------------------------------------------------


def test_rows_of_every_kind_in_one_batch_are_as_each_alone(pipeline):
    """Each row has its own timestep, noise level, guidance and remaining steps."""
    alone = [latents_alone(pipeline, request) for request in kinds(pipeline)]
    with torch.inference_mode():
        rows = [pipeline.begin(request) for request in kinds(pipeline)]
        assert {row.shape for row in rows} == {(4, 2, 2, TOKENS)}
        while left := [row for row in rows if not row.finished]:
            for row, epsilon in zip(left, evaluate(pipeline.predict, left), strict=True):
                row.advance(epsilon)
    for row, x in zip(rows, alone, strict=True):
        torch.testing.assert_close(row.x, x, atol=1e-4, rtol=0)


def test_a_step_is_one_pass_whatever_the_rows(watched):
    pipeline, batches = watched
    engine = Engine(pipeline)
    for request in kinds(pipeline):
        engine.submit(request)
    run(engine)
    # 8 rows with their prompts and 7 without; then rows leave, and one's guidance ends
    assert batches == [15, 15, 13, 6, 2]


# --- joining and leaving --------------------------------------------------------------------


@pytest.mark.parametrize("late", range(6))
def test_joining_at_any_step_changes_no_image(pipeline, late):
    first, second = (request_of(pipeline, seed=s, steps=5 - s, prompt="ab"[s]) for s in (0, 1))
    engine = Engine(pipeline)
    one = engine.submit(first)
    for _ in range(late):
        engine.turn()
    other = engine.submit(second)
    run(engine)
    assert_near(one.result(), drawn_alone(pipeline, first))
    assert_near(other.result(), drawn_alone(pipeline, second))


@pytest.mark.parametrize("step", range(5))
def test_cancelling_at_any_step_changes_no_other_image(watched, step):
    pipeline, batches = watched
    doomed, other = (request_of(pipeline, seed=s, steps=4, guidance=1) for s in (0, 1))
    engine = Engine(pipeline)
    leaves = engine.submit(doomed, lambda p: leaves.cancel() if p.done == step else None)
    stays = engine.submit(other)
    if step == 0:
        assert leaves.cancel()
    run(engine)
    assert leaves.cancelled() and leaves.row is None
    assert batches == [2] * step + [1] * (4 - step)
    assert_near(stays.result(), drawn_alone(pipeline, other))
    with pytest.raises(CancelledError):
        leaves.result()
    assert wait_for([leaves, stays], timeout=1).done == {leaves, stays}


def test_a_finished_image_cannot_be_cancelled(pipeline):
    engine = Engine(pipeline)
    ticket = engine.submit(request_of(pipeline, steps=1))
    run(engine)
    assert not ticket.cancel() and ticket.result().size == (SIDE, SIDE)


def test_requests_of_other_shapes_take_turns(watched):
    """Sizes and token lengths that differ share no pass; none waits until another is done."""
    pipeline, _ = watched
    order = []
    asked = [
        {},
        {"size": (SIDE, 24)},
        {"prompt": "words " * 9},  # two chunks
        {"prompt": "b"},
    ]
    requests = [request_of(pipeline, seed=i, steps=2, **each) for i, each in enumerate(asked)]
    engine = Engine(pipeline)
    tickets = [
        engine.submit(request, lambda p, i=i: order.append(i)) for i, request in enumerate(requests)
    ]
    run(engine)
    assert order == [0, 3, 1, 2, 0, 3, 1, 2]
    for ticket, request in zip(tickets, requests, strict=True):
        assert_near(ticket.result(), drawn_alone(pipeline, request))
        assert ticket.result().size == (request.settings.width, request.settings.height)


def test_the_batch_has_a_limit_and_a_place_is_filled_at_once(watched):
    pipeline, batches = watched
    engine = Engine(pipeline, max_batch=2)
    tickets = [
        engine.submit(request_of(pipeline, seed=s, steps=n, guidance=1))
        for s, n in enumerate((1, 3, 2, 1))
    ]
    run(engine)
    assert batches == [2, 2, 2, 1] and all(ticket.done() for ticket in tickets)


def test_without_a_limit_the_batch_holds_a_number_of_pixels(watched, monkeypatch):
    pipeline, batches = watched
    monkeypatch.setattr("koala.generation.engine.PIXELS_AT_ONCE", 2 * SIDE * SIDE)
    sizes = [(SIDE, SIDE)] * 3 + [(64, 64)]  # the last is larger than a batch, and goes alone
    engine = Engine(pipeline)
    for seed, size in enumerate(sizes):
        engine.submit(request_of(pipeline, seed=seed, steps=1, guidance=1, size=size))
    run(engine)
    assert batches == [2, 1, 1]


def test_waiting_requests_are_taken_in_the_order_asked_for(pipeline):
    done = []
    engine = Engine(pipeline, max_batch=1, order=lambda ticket: -ticket.request.settings.seed)
    for seed in (1, 3, 2):
        ticket = engine.submit(request_of(pipeline, seed=seed, steps=1))
        ticket.add_done_callback(lambda t: done.append(t.request.settings.seed))
    run(engine)
    assert done == [3, 2, 1]


@settings(max_examples=25, deadline=None)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["join", "step", "leave"]), st.integers(0, len(KINDS) - 1)),
        max_size=24,
    ),
    strict=st.booleans(),
)
def test_whoever_joins_and_leaves_whenever_each_image_is_its_own(pipeline, alone, moves, strict):
    """Requests of all kinds, in any order: latents within 1e-4, bit for bit where it is strict."""
    ends: list[tuple[int, torch.Tensor]] = []
    there: list[tuple[int, Ticket]] = []

    class Watched:
        predict, use_loras = staticmethod(pipeline.predict), pipeline.use_loras
        begin, preview = pipeline.begin, pipeline.preview

        def finish(self, rows):
            ends.extend((int(row.sampler.noise.generator.initial_seed()), row.x) for row in rows)
            return [Image.new("RGB", (SIDE, SIDE)) for _ in rows]

    engine = Engine(Watched(), max_batch=5, strict=strict)
    every = kinds(pipeline)
    for move, i in moves:
        if move == "join":
            there.append((i, engine.submit(every[i])))
        elif move == "step":
            engine.turn()
        elif there:
            there.pop(i % len(there))[1].cancel()
    run(engine)
    assert all(ticket.done() and not ticket.cancelled() for _, ticket in there)
    assert len(ends) >= len(there)
    for seed, x in ends:  # the request's number is its seed
        if strict:
            assert torch.equal(x, alone[seed])
        else:
            torch.testing.assert_close(x, alone[seed], atol=1e-4, rtol=0)


# --- strict ---------------------------------------------------------------------------------


def test_strict_images_are_bit_for_bit_those_drawn_alone(watched):
    pipeline, batches = watched
    tickets = run_together(Engine(pipeline, strict=True), kinds(pipeline))
    assert max(batches) == 2  # with and without the prompt
    together = bytes_of(ticket.result() for ticket in tickets)
    assert together == bytes_of(drawn_alone(pipeline, request) for request in kinds(pipeline))


# --- progress -------------------------------------------------------------------------------


def test_progress_comes_after_every_step_with_a_preview(pipeline):
    seen, previews = [], []

    def on_step(progress):
        seen.append((progress.done, progress.steps))
        previews.append(progress.preview())

    engine = Engine(pipeline)
    engine.submit(request_of(pipeline, steps=4, size=(64, 48)), on_step)
    run(engine)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(preview.size == (8, 6) and preview.mode == "RGB" for preview in previews)
    assert len(set(bytes_of(previews))) == 4


def test_previews_come_nearer_to_the_image():
    """With a trained model; what is rough is only the map to colours."""
    pipeline, previews = load("koala-mini", "cpu"), []
    engine = Engine(pipeline)
    (request,) = pipeline.requests("a fox, noto style", seed=7)
    ticket = engine.submit(request, lambda progress: previews.append(progress.preview()))
    run(engine)
    small = ticket.result().resize(previews[0].size, Image.Resampling.BOX)
    likeness = [
        np.corrcoef(np.ravel(preview), np.ravel(small))[0, 1]  # whatever the brightness
        for preview in previews
    ]
    assert likeness[0] < likeness[-1] > 0.9


# --- failures -------------------------------------------------------------------------------


def test_a_request_that_fails_while_it_begins_leaves_the_others_alone(pipeline):
    good, bad = (request_of(pipeline, seed=s, steps=2) for s in (0, 1))
    begin = pipeline.begin

    class Broken:
        predict = staticmethod(pipeline.predict)
        finish, preview, use_loras = pipeline.finish, pipeline.preview, pipeline.use_loras

        def begin(self, request):
            if request is bad:
                raise UserError("no such thing")
            return begin(request)

    engine = Engine(Broken())
    fails, works = engine.submit(bad), engine.submit(good)
    run(engine)
    assert_near(works.result(), drawn_alone(pipeline, good))
    with pytest.raises(UserError, match="no such thing"):
        fails.result()


@pytest.mark.parametrize("at", [1, 3])
def test_a_row_that_breaks_the_pass_is_found_and_leaves(pipeline, at, monkeypatch):
    """As when memory runs out: the pass over all fails, and so does the one over the culprit."""
    requests = [request_of(pipeline, seed=s, steps=3, prompt=p) for s, p in enumerate("abc")]
    culprit = latents_alone_condition(pipeline, requests[1])
    plain, passes = pipeline.predict, []

    def predict(x, timesteps, condition):
        passes.append(len(x))
        theirs = (condition.text == culprit).flatten(1).all(dim=1).any()
        if theirs and len([n for n in passes if n > 2]) >= at:
            raise MemoryError("too much")
        return plain(x, timesteps, condition)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "predict", predict)
        tickets = run_together(Engine(pipeline), requests)
    for i in (0, 2):
        assert_near(tickets[i].result(), drawn_alone(pipeline, requests[i]))
    with pytest.raises(MemoryError, match="too much"):
        tickets[1].result()


def latents_alone_condition(pipeline, request):
    return pipeline.begin(request).condition.text


def test_a_decoder_that_fails_for_one_leaves_the_others_alone(pipeline, monkeypatch):
    requests = [request_of(pipeline, seed=s, steps=2) for s in range(3)]
    spoilt = latents_alone(pipeline, requests[1])
    plain = pipeline.decode

    def decode(latents):
        if any(torch.allclose(one, spoilt[0], atol=1e-3) for one in latents):
            raise Failure("not a number")
        return plain(latents)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode", decode)
        tickets = run_together(Engine(pipeline), requests)
    assert [type(ticket.exception()) for ticket in tickets] == [type(None), Failure, type(None)]
    assert_near(tickets[2].result(), drawn_alone(pipeline, requests[2]))


def test_a_callback_that_fails_fails_its_own_request(pipeline):
    engine = Engine(pipeline)
    fails = engine.submit(request_of(pipeline, steps=2), lambda progress: 1 / 0)
    works = engine.submit(request_of(pipeline, seed=1, steps=2))
    run(engine)
    assert isinstance(fails.exception(), ZeroDivisionError) and works.exception() is None


# --- threads --------------------------------------------------------------------------------


def test_many_threads_submit_to_one_engine(pipeline):
    """One thread owns the device; every caller gets its own picture."""
    requests = kinds(pipeline)
    expected = [drawn_alone(pipeline, request) for request in requests]
    found, workers = {}, set()

    def ask(i):
        note = lambda progress: workers.add(threading.current_thread().name)  # noqa: E731
        found[i] = engine.submit(requests[i], note).result(timeout=60)

    with Engine(pipeline) as engine:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, image in enumerate(expected):
        assert_near(found[i], image)
    assert workers == {"koala-engine"}


def test_asyncio_can_await_a_ticket(pipeline):
    request = request_of(pipeline, steps=2)

    async def ask(engine):
        return await asyncio.wait_for(asyncio.wrap_future(engine.submit(request)), 60)

    with Engine(pipeline) as engine:
        assert_near(asyncio.run(ask(engine)), drawn_alone(pipeline, request))


@pytest.mark.parametrize("finish", [True, False])
def test_closing_finishes_or_cancels_what_is_there_and_takes_no_more(pipeline, finish):
    started = threading.Event()
    engine = Engine(pipeline, max_batch=1).start()
    requests = [request_of(pipeline, seed=s, steps=20) for s in range(3)]
    tickets = [engine.submit(request, lambda progress: started.set()) for request in requests]
    assert started.wait(60)
    engine.close(finish)
    assert all(ticket.done() for ticket in tickets)
    assert [ticket.cancelled() for ticket in tickets[1:]] == [not finish] * 2
    assert "koala-engine" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(Failure, match="the engine is closed"):
        engine.submit(requests[0])


def test_an_exception_in_the_callers_block_cancels_what_is_left(pipeline):
    tickets = []

    def fails():
        with Engine(pipeline) as engine:
            tickets.extend(engine.submit(request_of(pipeline, seed=s, steps=500)) for s in range(2))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [ticket.cancelled() for ticket in tickets] == [True, True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_ever_if_the_worker_dies(pipeline):
    class Dies:
        predict, use_loras = staticmethod(pipeline.predict), pipeline.use_loras

        def begin(self, request) -> BatchRow:
            raise SystemExit

    engine = Engine(Dies())
    tickets = [engine.submit(request_of(pipeline, seed=s)) for s in (0, 1)]
    engine.start()
    for ticket in tickets:
        with pytest.raises(SystemExit):
            ticket.result(timeout=60)
    with pytest.raises(Failure, match="closed"):
        engine.submit(request_of(pipeline))
    engine.close()


# --- what servers need ----------------------------------------------------------------------


def test_a_request_says_when_it_is_let_in_and_passes_say_what_they_took(pipeline):
    told, passes = [], []
    engine = Engine(pipeline, max_batch=1, on_pass=passes.append)
    for name in "ab":
        request = request_of(pipeline, steps=2, guidance=2.0, guidance_until=0.5)
        engine.submit(
            request, lambda p, n=name: told.append(n), lambda n=name: told.append(f"+{n}")
        )
    assert [ticket.number for ticket in engine.waiting()] == [0, 1]
    run(engine)
    assert told == ["+a", "a", "a", "+b", "b", "b"] and not engine.waiting()
    pixels = SIDE * SIDE
    assert [one.pixels for one in passes] == [2 * pixels, pixels] * 2
    assert all(one.images == 1 and one.seconds > 0 for one in passes)


def test_rows_and_pixels_both_have_limits(watched):
    pipeline, batches = watched
    engine = Engine(pipeline, max_batch=3, max_pixels=2 * SIDE * SIDE)
    for seed, size in enumerate([(SIDE, SIDE)] * 3 + [(64, 64)]):
        engine.submit(request_of(pipeline, seed=seed, steps=1, guidance=1, size=size))
    run(engine)
    assert batches == [2, 1, 1]


def test_a_deadline_ends_a_request_that_waits_or_is_on_its_way(watched):
    pipeline, batches = watched
    requests = [request_of(pipeline, seed=s, steps=3, guidance=1) for s in range(3)]
    engine = Engine(pipeline, max_batch=2)

    def past(_):
        late.deadline = waits.deadline = time.monotonic()

    late = engine.submit(requests[0], past, deadline=time.monotonic() + 60)
    other = engine.submit(requests[1])
    waits = engine.submit(requests[2], deadline=time.monotonic() + 60)
    run(engine)
    for ticket in (late, waits):
        with pytest.raises(Late, match="deadline"):
            ticket.result()
    assert batches == [2, 1, 1] and late.row is None
    assert_near(other.result(), drawn_alone(pipeline, requests[1]))


@pytest.fixture(scope="module")
def loras(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    base = toy_base(pipeline.unet)
    return [
        toy_lora(folder / f"{n}.safetensors", base, seed=s) for s, n in enumerate(("ink", "oil"))
    ]


def test_requests_with_different_loras_are_as_each_alone(pipeline, loras):
    """The same prompt and seed, so that nothing else tells them apart, and two that share."""
    ink, oil = loras
    sets = [{}, {ink: 1.0}, {ink: 0.5, oil: -1.0}, {oil: 1.0}, {}, {ink: 1.0}]
    requests = [request_of(pipeline, steps=3, guidance=3.0, lora=lora) for lora in sets]
    expected = []
    for lora in sets:  # on the model for good
        for file, scale in lora.items():
            pipeline.add_lora(file, scale)
        expected.append(pipeline("a", size=(SIDE, SIDE), seed=0, steps=3, guidance=3.0))
        for file in lora:
            pipeline.remove_lora(file.stem)
    passes = []
    tickets = run_together(Engine(pipeline, on_pass=passes.append), requests)
    for ticket, request, own in zip(tickets, requests, expected, strict=True):
        assert_near(ticket.result(), own.images[0])
        assert request.settings == own.settings[0]
    assert len({image.tobytes() for image in (own.images[0] for own in expected)}) == 4
    assert [one.images for one in passes] == [2, 2, 1, 1] * 3
    assert_near(drawn_alone(pipeline, requests[0]), expected[0].images[0])  # nothing stayed on


def test_a_lora_that_cannot_be_read_fails_its_own_request(pipeline, loras, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(loras[0].read_bytes())
    request = request_of(pipeline, steps=2, lora={broken: 1.0})
    broken.write_bytes(b"nothing")
    engine = Engine(pipeline)
    fails, works = engine.submit(request), engine.submit(request_of(pipeline, steps=2))
    run(engine)
    assert isinstance(fails.exception(), UserError)
    assert_near(works.result(), drawn_alone(pipeline, request_of(pipeline, steps=2)))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"nowhere.safetensors": 1.0}, "nowhere"),
        ({"ink": 1000}, "LoRA scale is 1000"),
    ],
)
def test_loras_of_a_request_that_are_refused(pipeline, lora, words):
    with pytest.raises(UserError, match=words):
        request_of(pipeline, lora=lora)


def test_two_loras_of_one_name_are_refused(pipeline, loras, tmp_path):
    other = tmp_path / loras[0].name
    other.write_bytes(loras[0].read_bytes())
    with pytest.raises(UserError, match="two LoRAs are called 'ink'"):
        request_of(pipeline, lora={loras[0]: 1.0, other: 1.0})


def test_what_does_not_run_the_model_plainly_takes_no_loras(watched, loras):
    pipeline, _ = watched
    with pytest.raises(UserError, match="that plain PyTorch runs"):
        request_of(pipeline, lora={loras[0]: 1.0})
