"""One way to draw one model, timed: here, or in a process of its own.

A process of its own has the way's threads, its memory, and nothing else. On a CPU the ways stand
ready side by side in such processes and take turns, so that a machine that changes its speed
changes it for all. On a GPU, whose memory they would share, one follows another in this process.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode

from koala.architectures.config import from_unet_config
from koala.architectures.flops import flops
from koala.benchmark import measure
from koala.benchmark.cases import Subject
from koala.benchmark.measure import GB, Timing
from koala.benchmark.models import build, stock
from koala.benchmark.ways import STOCK, Way
from koala.errors import Failure, UserError
from koala.generation.decode import load_tiny
from koala.generation.loader import set_runtime
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.backends import example
from koala.generation.runtime.dtypes import torch_dtype
from koala.generation.runtime.pytorch import predictor
from koala.utils.networks import AutoencoderKL

UNET_STEPS = 25  # of the U-Net alone, as published


@dataclass(frozen=True)
class Drawn:
    """What one image took."""

    seconds: float
    cpu_seconds: float  # of all threads


class Drawer:
    """Draws with stock diffusers or with our pipeline, each image from a new prompt.

    A new prompt, so that no cache skips the text encoders.
    """

    def __init__(
        self,
        chosen: Subject,
        way: Way,
        device: torch.device,
        dtype: str,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.chosen, self.way, self.device, self.dtype = chosen, way, device, dtype
        measure.release(device)
        self._before = measure.held_bytes(device)
        measure.reset_peak(device)
        self._prompts = count()
        self.pipeline = build(chosen, device, torch_dtype(dtype))
        self.backend, self._draw = self._prepared()
        self._draw()  # warm-up: compiling and packing are not timed

    def _prepared(self) -> tuple[str, Callable[[], object]]:
        """What runs the U-Net, and the function that draws one image."""
        way, case, pipeline = self.way, self.chosen.case, self.pipeline
        if way.name == STOCK:
            pipe = stock(pipeline)
            return "torch", lambda: pipe(
                self._prompt(),
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
                height=case.pixels,
                width=case.pixels,
            )
        decoder = None
        if way.decode is not None and self.chosen.folder is not None:
            decoder = load_tiny(self.chosen.folder, torch_dtype(self.dtype)).to(self.device)
        backend = set_runtime(pipeline, way.backend, way.compiled, way.graphs, decoder=decoder)
        return "torch" if backend is None else backend.name, lambda: pipeline(
            self._prompt(),
            steps=case.steps,
            guidance=case.guidance,
            guidance_until=way.guidance_until,
            size=(case.pixels, case.pixels),
        )

    def _prompt(self) -> str:
        return f"a fox, number {next(self._prompts)}"

    def draw(self) -> Drawn:
        """One image."""
        measure.synchronize(self.device)
        start, worked = time.perf_counter(), time.process_time()
        self._draw()
        measure.synchronize(self.device)
        return Drawn(time.perf_counter() - start, time.process_time() - worked)

    @torch.inference_mode()
    def unet(self) -> Timing:
        """25 U-Net evaluations with guidance, twice."""
        unet = self.pipeline.unet
        predict = predictor(unet) if self.way.name == STOCK else self.pipeline.predict
        side = self.chosen.case.pixels // self.pipeline.factor
        inputs = example(unet, 2, side, self.pipeline.conditioner.tokens)

        def steps() -> None:
            for _ in range(UNET_STEPS):
                predict(*inputs)

        return measure.timing(steps, 2, self.device)

    def peak_gb(self) -> float | None:
        """The most memory so far: of the allocator on CUDA, of the whole process on a CPU."""
        peak = measure.peak_bytes(self.device)
        return None if peak is None else (peak - self._before) / GB

    def flops(self) -> int:
        """Operations of one image."""
        return image_flops(self.pipeline, self.chosen)

    def under(self, budget: int) -> float | None:
        """Seconds of an image with CUDA's allocator limited to `budget` GB; None: out of memory."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        measure.release(self.device)
        torch.cuda.set_per_process_memory_fraction(budget * GB / total, self.device)
        try:
            return measure.timing(self._draw, 1, self.device).median
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            measure.release(self.device)

    def close(self) -> None:
        """Gives the memory back."""
        del self.pipeline, self._draw
        measure.release(self.device)


class RemoteDrawer:
    """A `Drawer` in a process of its own; a context manager."""

    def __init__(self, *arguments: Any) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_answer, args=(other, arguments), daemon=True)
        self._process.start()
        other.close()
        try:
            self.backend: str = self._received()
        except BaseException:
            self.close()
            raise

    def draw(self) -> Drawn:
        return self._asked("draw")

    def unet(self) -> Timing:
        return self._asked("unet")

    def peak_gb(self) -> float | None:
        return self._asked("peak_gb")

    def flops(self) -> int:
        return self._asked("flops")

    def _asked(self, method: str) -> Any:
        self._pipe.send(method)
        return self._received()

    def _received(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Failure(
                f"the process that draws ended with status {self._process.exitcode}; "
                "-9 means that the machine's memory was too small"
            ) from None
        if isinstance(found, (UserError, Failure)):
            raise found
        return found

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _answer(pipe: Connection, arguments: tuple[Any, ...]) -> None:
    """Makes a `Drawer` and calls what is asked of it until the pipe is closed."""
    try:
        drawer = Drawer(*arguments)
    except (UserError, Failure) as error:
        pipe.send(error)
        return
    pipe.send(drawer.backend)
    while True:
        try:
            method = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(drawer, method)())


def image_flops(pipeline: Pipeline, chosen: Subject) -> int:
    """Operations of one image: all U-Net evaluations, and the decoder."""
    case = chosen.case
    arch = from_unet_config(pipeline.unet.config)
    one = flops(arch, case.pixels, case.pixels, pipeline.conditioner.tokens)
    with torch.device("meta"):
        vae = type(pipeline.vae).from_config(pipeline.vae.config)
        side = case.pixels // pipeline.factor
        latents = torch.empty(1, pipeline.unet.config.in_channels, side, side)
    assert isinstance(vae, AutoencoderKL)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return case.steps * case.rows * one + counter.get_total_flops()
