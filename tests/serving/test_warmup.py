"""Loading and warming up: every way of running the model that `koala serve` can be told."""

import pytest
import torch

from koala.generation import load
from koala.generation.runtime.fixed_batches import ROWS, in_fixed_batches
from koala.serving.image_request import ImageRequest
from koala.serving.run import loaded
from koala.serving.service import Service
from koala.serving.settings import Limits, Options
from koala.serving.warmup import MOST, warm_up
from toy import toy_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala")


@pytest.mark.parametrize(("max_batch", "largest"), [(1, 2), (3, 6), (5, 12), (16, 32)])
def test_all_sizes_of_fixed_batches_are_gone_through(folder, max_batch, largest):
    """All that a batch of so many pictures, with and without their prompts, can need."""
    pipeline, seen = load(folder, "cpu"), set()
    plain = pipeline.predict

    def watched(x, timesteps, condition):
        seen.add(len(x))
        return plain(x, timesteps, condition)

    pipeline.predict = in_fixed_batches(watched)
    assert warm_up(pipeline, max_batch, ROWS) == max_batch
    assert seen == {rows for rows in ROWS if rows <= largest}


# The plan counts the whole process, and so what earlier tests left in it.
@pytest.mark.parametrize("options", [{}, {"vram": "4"}, {"backend": "torch"}])
def test_what_is_loaded_draws(folder, options, tmp_path):
    told = []
    pipeline, found = loaded(
        Options(str(folder), device="cpu", data=tmp_path, limits=Limits(max_batch=2), **options),
        told.append,
    )
    assert found.limits.max_batch == 2
    assert found.limits.size == (64 * 64 if "vram" in options else None)  # as was planned
    service = Service(pipeline, found.limits)
    service.start()
    try:
        (image,) = service.submit(ImageRequest("a", steps=2, seed=0)).result().images
    finally:
        service.close()
    assert image.size == (64, 64)
    (own,) = load(folder, "cpu")("a", steps=2, seed=0).images
    assert max(abs(a - b) for a, b in zip(image.tobytes(), own.tobytes(), strict=True)) <= 1
    assert told and not any("\n" in line for line in told)  # of what runs it
    assert any(line.startswith("denoise") for line in told) == ("vram" in options)


@pytest.mark.parametrize(("gain", "batch"), [(0.0, MOST), (1e9, 1)])
def test_the_batch_doubles_as_long_as_that_gains(folder, monkeypatch, gain, batch):
    monkeypatch.setattr("koala.serving.warmup.GAIN", gain)
    monkeypatch.setattr("koala.serving.warmup.LONGEST", float("inf"))
    assert warm_up(load(folder, "cpu")) == batch


def test_a_batch_that_memory_does_not_hold_is_left_at_half(folder, monkeypatch):
    """Others need memory, too."""
    pipeline = load(folder, "cpu")
    plain = pipeline.predict

    def predict(x, timesteps, condition):
        if len(x) > 8:
            raise torch.OutOfMemoryError("too much")
        return plain(x, timesteps, condition)

    pipeline.predict = predict
    monkeypatch.setattr("koala.serving.warmup.GAIN", 0.0)  # whatever is gained
    assert warm_up(pipeline) == 2
