"""Drawing costs no more than it should: in proportion to steps and pixels, less in company.

Processor seconds of the bundled model on one thread, always of two cases in turns: what else the
machine does weighs on both alike. The bounds leave room for noise; `python -m benchmarks.engine`
has the figures.
"""

import statistics
import time
from typing import Any

import pytest
import torch

from koala.generation import Pipeline, load

SMALL = (64, 64)


@pytest.fixture(scope="module")
def pipeline():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load("koala-mini", "cpu")
    torch.set_num_threads(threads)


def seconds(pipeline: Pipeline, **asked: Any) -> float:
    requests = pipeline.requests("a fox, noto style", **({"size": SMALL, "seed": 1} | asked))
    start = time.process_time()
    pipeline.draw(requests)
    return time.process_time() - start


def times_as_long(pipeline: Pipeline, one: dict[str, Any], other: dict[str, Any]) -> float:
    """The other case's seconds over the one's: the median of three pairs."""
    for asked in (one, other):  # what is prepared once is not counted
        seconds(pipeline, **asked)
    pairs = [(seconds(pipeline, **one), seconds(pipeline, **other)) for _ in range(3)]
    return statistics.median(b / a for a, b in pairs)


def test_time_grows_in_proportion_to_steps(pipeline):
    assert times_as_long(pipeline, {"steps": 6}, {"steps": 24}) < 4 * 1.3


def test_time_grows_at_most_in_proportion_to_pixels(pipeline):
    few = {"steps": 4}
    assert times_as_long(pipeline, few, few | {"size": (256, 256)}) < 16 * 1.3


def test_eight_pictures_cost_less_than_eight_times_one(pipeline):
    few = {"steps": 4}
    assert times_as_long(pipeline, few, few | {"number": 8}) < 8 * 0.9


def test_guidance_costs_no_second_pass(pipeline):
    few = {"steps": 8}
    assert times_as_long(pipeline, few | {"guidance": 1.0}, few) < 2
    assert times_as_long(pipeline, few, few | {"guidance_until": 0.5}) < 1.05
