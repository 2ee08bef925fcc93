"""Drawing step by step, without an engine; and that an engine draws each image as if alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from koala.generation import Engine, Pipeline
from koala.generation.denoise import BatchRow, finish
from koala.generation.requests import Request


@torch.inference_mode()
def stepped(pipe: Pipeline, rows: Sequence[BatchRow]) -> torch.Tensor:
    """The latents of rows of one shape and number of steps, stepped together to their end."""
    finish(pipe.predict, rows)
    return torch.cat([row.x for row in rows])


@torch.inference_mode()
def latents_of(pipe: Pipeline, prompts: str | list[str], **asked: Any) -> torch.Tensor:
    """The latents of all images that are asked for."""
    return stepped(pipe, [pipe.begin(request) for request in pipe.requests(prompts, **asked)])


def assert_near(image: Any, other: Any) -> None:
    """Two images are the same but for rounding: company in a batch can turn one, of 255."""
    assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


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
        assert_near(ticket.result(), expected)
    assert len({image.tobytes() for image in alone}) == 4
