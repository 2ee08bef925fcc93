"""Before the first request: everything that happens once has happened, and the batch has a size.

How many pictures one pass should hold is measured: as long as doubling them makes each clearly
cheaper, they are doubled. More would only make all wait for all.
"""

import time

import torch

from koala.generation import Pipeline, Request
from koala.generation.arrangement import ran_out
from koala.generation.denoise import evaluate

GAIN = 1.05  # that a doubled batch must make each picture cheaper
MOST = 32  # pictures
LONGEST = 2.0  # seconds of a pass that is not worth doubling


@torch.inference_mode()
def warm_up(pipeline: Pipeline) -> int:
    """Evaluates native-sized batches of growing size; the number of pictures worth a pass."""
    (request,) = pipeline.requests("a", steps=2, seed=0)
    best, cost = 1, _seconds(pipeline, request, 1)
    while best < MOST and cost * best < LONGEST:
        try:
            cheaper = _seconds(pipeline, request, 2 * best) / (2 * best)
        except Exception as error:
            if ran_out(error):
                break
            raise
        if cheaper * GAIN > cost:
            break
        best, cost = 2 * best, cheaper
    return best


def _seconds(pipeline: Pipeline, request: Request, pictures: int) -> float:
    """Of one step of so many pictures, the better of three after one that warms up."""
    row = pipeline.begin(request)
    found = []
    for _ in range(4):
        start = time.perf_counter()
        epsilons = evaluate(pipeline.predict, [row] * pictures)
        if epsilons[0].device.type == "cuda":
            torch.cuda.synchronize(epsilons[0].device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
