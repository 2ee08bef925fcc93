"""Drawing costs no more than it should: in proportion to steps and pixels, less in a batch, and not
more than in diffusers.

CPU seconds of the bundled model on one thread, always of two cases in turns: what else the machine
does weighs on both alike. The bounds leave room for noise; `python -m benchmarks.engine` has the
figures.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from diffusers import StableDiffusionXLPipeline

from koala.checkpoints.bundled import BUNDLED
from koala.generation import Pipeline, load

SMALL = (64, 64)
PROMPT = "a fox, noto style"


@pytest.fixture(scope="module")
def pipeline():
    return load("koala-mini", "cpu")


def drawing(pipeline: Pipeline, **asked: Any) -> Callable[[], object]:
    given = {"size": SMALL, "seed": 1} | asked
    return lambda: pipeline.draw(pipeline.requests(PROMPT, **given))


def seconds(do: Callable[[], object]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def times_as_long(one: Callable[[], object], other: Callable[[], object]) -> float:
    """The other's seconds over the one's: the median of three pairs."""
    for do in (one, other):  # what is prepared once is not counted
        do()
    pairs = [(seconds(one), seconds(other)) for _ in range(3)]
    return statistics.median(b / a for a, b in pairs)


def test_a_image_costs_no_more_than_in_diffusers(pipeline):
    theirs = StableDiffusionXLPipeline.from_pretrained(BUNDLED / "koala-mini")
    theirs.set_progress_bar_config(disable=True)
    stock = partial(theirs, PROMPT, width=64, height=64, guidance_scale=3.5, num_inference_steps=10)
    assert times_as_long(stock, drawing(pipeline)) < 1.2  # 0.9 where it was measured: docs/log.md


def test_time_grows_in_proportion_to_steps(pipeline):
    assert times_as_long(drawing(pipeline, steps=6), drawing(pipeline, steps=24)) < 4 * 1.3


def test_time_grows_at_most_in_proportion_to_pixels(pipeline):
    few, large = (drawing(pipeline, steps=4, size=size) for size in (SMALL, (256, 256)))
    assert times_as_long(few, large) < 16 * 1.3


def test_eight_images_cost_less_than_eight_times_one(pipeline):
    one, eight = (drawing(pipeline, steps=4, number=number) for number in (1, 8))
    assert times_as_long(one, eight) < 8 * 0.9


def test_guidance_costs_no_second_pass(pipeline):
    guided = drawing(pipeline, steps=8)
    assert times_as_long(drawing(pipeline, steps=8, guidance=1.0), guided) < 2
    assert times_as_long(guided, drawing(pipeline, steps=8, guidance_until=0.5)) < 1.05
