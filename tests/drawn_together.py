"""Requests of different kinds in one engine: each image is as if it were drawn alone."""

from collections.abc import Sequence

import numpy as np

from koala.generation import Engine, Pipeline
from koala.generation.requests import Request


def assert_drawn_together_as_alone(pipe: Pipeline, requests: Sequence[Request]) -> None:
    """Of four requests of four steps, of which two can share their passes."""
    alone = [pipe.draw([request]).images[0] for request in requests]
    passes = []
    engine = Engine(pipe, on_pass=lambda one: passes.append(one.images))
    tickets = [engine.submit(request) for request in requests]
    while engine.turn():
        pass
    assert sorted(passes) == [1] * 8 + [2] * 4
    for ticket, expected in zip(tickets, alone, strict=True):
        difference = np.abs(np.asarray(ticket.result(), int) - np.asarray(expected, int))
        assert difference.max() <= 1
    assert len({image.tobytes() for image in alone}) == 4
