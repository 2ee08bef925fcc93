"""The section of `benchmarks.gpu` that trains: samples a second, rung by rung.

Speed is that of whole steps, teacher, optimiser and average included, as `koala.distillation.loop`
takes them. Beside it stands the way public scripts of this kind do it, made anew here: eager, hooks
on blocks, fp16 autocast with a scaler, VAE and text encoders on line, memory as it comes. Each rung
adds one thing to the rung before.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu_foretold import Foretold
from benchmarks.gpu_run import Row, Rows, Run
from koala.architectures.flops import flops as forward_flops
from koala.architectures.table import FACTOR, UNetArchitecture, get, student_of
from koala.benchmark import measure
from koala.benchmark.measure import GB
from koala.benchmark.models import new_conditioner, new_unet, new_vae
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.load import load_scheduler_config, load_vae
from koala.distillation.ema import EMA
from koala.distillation.forward_process import NoiseSchedule, generators_at
from koala.distillation.loop import gradients
from koala.distillation.optimizers import new_optimizer
from koala.distillation.parallel import World, lay_out
from koala.distillation.settings import PAPER_TAPS, DistillationSettings, Hardware, Training
from koala.distillation.taps import paired_points, tap_points
from koala.distillation.tasks import Distillation
from koala.recipes.memory import TrainingSetup
from koala.text_conditioning import TextConditioner

BASE = BUNDLED / "koala-mini"  # whose schedule is SDXL's; a rehearsal takes all its small parts
BATCHES = (16, 8, 4, 2, 1)  # samples at once: the first that the way of public scripts can
A_STEP = 128  # samples of a step: the paper's
CUTS = ("koala-700m", "koala-1b")
STEPS, PATIENCE = 6, 8.0  # steps that are timed at most, and seconds after which no other is begun


@dataclass(frozen=True)
class Scene:
    """What is trained, of what, and how large."""

    device: torch.device
    teacher: UNetArchitecture
    pixels: int
    peak: float  # FLOP/s of a large product
    toy: bool

    @classmethod
    def of(cls, run: Run) -> "Scene":
        teacher = get("sdxl-mini" if run.toy else "sdxl")
        if run.toy:  # of one width, so that there is less to compile
            teacher = replace(teacher, sample=8, widths=(32,) * 3, heads=(1,) * 3)
        pixels = teacher.sample * FACTOR
        return cls(run.device, teacher, pixels, run.ceilings.flops, run.toy)

    @property
    def half(self) -> torch.dtype:
        """What public scripts compute in; a processor's autocast knows bf16 alone."""
        return torch.float16 if self.device.type == "cuda" else torch.bfloat16

    @property
    def compiler(self) -> str:
        """On a processor, whose own takes minutes, one that only finds the graphs."""
        return "inductor" if self.device.type == "cuda" else "eager"

    def student(self, cut: str) -> UNetArchitecture:
        return student_of(self.teacher, cut)

    def flops(self, cut: str) -> int:
        """Of a sample's step: the teacher's forward and three times the student's."""
        side = self.pixels
        own, theirs = (
            forward_flops(arch, side, side, arch.tokens)
            for arch in (self.student(cut), self.teacher)
        )
        return 3 * own + theirs

    def conditioner(self) -> TextConditioner:
        if self.toy:
            return TextConditioner.from_folder(BASE, device=self.device, cache_size=0)
        return new_conditioner(self.device, self.half, cache_size=0)

    def vae(self) -> AutoencoderKL:
        if self.toy:
            return load_vae(BASE).to(self.device, self.half)
        return new_vae(self.device, self.half)

    def batch(self, n: int) -> dict[str, Any]:
        """n prepared samples, as the loader gives them: on the CPU, each caption another."""
        side = self.pixels // FACTOR
        return {
            "latents": torch.randn(n, 4, side, side),
            "captions": [f"a photograph of fox number {i}, in the snow" for i in range(n)],
            "time_ids": torch.tensor([[1457.0, 1274, 0, 0, self.pixels, self.pixels]] * n),
        }


def plan_of(
    scene: Scene, cut: str, hardware: Hardware, batch: int, optimizer: str = "adamw"
) -> TrainingSetup:
    """Such a training as the dry run sees it."""
    training = Training(batch, batch, lr=1e-5, optimizer=optimizer, ema_half_life=10_000)
    return TrainingSetup(
        scene.student(cut), scene.teacher, DistillationSettings(), training, hardware, 1,
        scene.pixels, on_gpu=scene.device.type == "cuda",
    )  # fmt: skip


class Steps(Protocol):
    """Something that trains a step at a time."""

    batch: int  # samples of a step
    loss: float  # of the last step

    def step(self) -> None: ...


class PublicWay:
    """A step as public scripts take it; `prepared` latents and bf16 in the place of fp16 follow."""

    def __init__(self, scene: Scene, cut: str, batch: int, prepared: bool, half: torch.dtype):
        self.batch, self.half, self.device = batch, half, scene.device
        self.student = new_unet(scene.student(cut), scene.device, torch.float32)
        self.student.requires_grad_(True).train()
        self.teacher = new_unet(scene.teacher, scene.device, half)
        self.text = scene.conditioner()
        self.vae = None if prepared else scene.vae()
        self.schedule = NoiseSchedule(load_scheduler_config(BASE))
        points = tap_points(self.student, PAPER_TAPS)
        self.pairs = dict(
            zip(points, paired_points(self.student, self.teacher, points), strict=True)
        )
        self.seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        for name, unet, own in (
            ("student", self.student, self.pairs), ("teacher", self.teacher, self.pairs.values()),
        ):  # fmt: skip
            for point in own:
                unet.get_submodule(point).register_forward_hook(_kept(self.seen[name], point))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)
        self.scaler = torch.amp.GradScaler(
            scene.device.type, init_scale=1024.0, enabled=half == torch.float16
        )
        self.average = EMAModel(self.student.parameters())
        self.data = scene.batch(batch)
        self.data["pixels"] = torch.randn(batch, 3, scene.pixels, scene.pixels)

    def step(self) -> None:
        latents = self._latents()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (self.batch,), device=self.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        with torch.autocast(self.device.type, self.half):
            told = self._told()
            prediction = self.student(noisy, timesteps, **told).sample
            with torch.no_grad():
                target = self.teacher(noisy.to(self.half), timesteps, **told).sample
        loss = F.mse_loss(prediction.float(), noise)
        loss = loss + F.mse_loss(prediction.float(), target.float())
        for own, theirs in self.pairs.items():
            f_s, f_t = self.seen["student"][own], self.seen["teacher"][theirs]
            loss = loss + F.mse_loss(f_s.float(), f_t.float())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.step(self.student.parameters())
        self.loss = loss.item()

    @torch.no_grad()
    def _latents(self) -> Tensor:
        if self.vae is None:
            return self.data["latents"].to(self.device)
        pixels = self.data["pixels"].to(self.device, self.half)
        return self.vae.encode(pixels).latent_dist.sample().float() * 0.13

    @torch.no_grad()
    def _told(self) -> dict[str, Any]:
        text, pooled = self.text(self.data["captions"])
        ids = self.data["time_ids"].to(self.device)
        added = {"text_embeds": pooled, "time_ids": ids}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def _kept(into: dict[str, Tensor], point: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        into[point] = output[0] if isinstance(output, tuple) else output

    return hook


class Ours:
    """A step as `koala.distillation.loop` takes it, on latents that are prepared."""

    def __init__(
        self, scene: Scene, cut: str, hardware: Hardware, batch: int, *,
        optimizer: str = "adamw", stored_text: bool = False,
    ):  # fmt: skip
        self.scene, self.taken = scene, 0
        self.plan = plan_of(scene, cut, hardware, batch, optimizer)
        self.training = self.plan.training
        student = new_unet(self.plan.student, scene.device, torch.float32)
        teacher = new_unet(scene.teacher, scene.device, scene.half)
        self.text: Any = None if stored_text else scene.conditioner()
        schedule = NoiseSchedule(load_scheduler_config(BASE))
        student.requires_grad_(True).train()
        self.task = Distillation(
            student, teacher, self.text, schedule, DistillationSettings(), BASE
        )
        self.layout = lay_out(self.task, hardware, World(device=scene.device))
        self.optimizer = new_optimizer(self.training, student)
        self.average = EMA(student, self.training.ema_half_life, hardware.ema_on_cpu)
        self.resize(batch, hardware.accumulate)

    def resize(self, batch: int, parts: int) -> None:
        """Other samples to a step, computed in so many parts."""
        self.batch = batch
        hardware = replace(self.layout.hardware, accumulate=parts)
        training = replace(self.training, batch=batch, samples=batch)
        self.layout = replace(self.layout, hardware=hardware)
        self.plan = replace(self.plan, hardware=hardware, training=training)
        self.data = self.scene.batch(batch)
        if self.text is None:
            arch = self.scene.teacher
            self.data["text"] = torch.randn(batch, arch.tokens, arch.context)
            self.data["pooled"] = torch.randn(batch, arch.pooled)

    def step(self) -> None:
        draws = generators_at(0, self.taken, self.batch)
        sums = gradients(self.task, self.layout, self.data, draws)
        module = self.task.trainable
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.training.clip)
        *_, self.loss, _ = torch.stack([*sums.values(), norm]).tolist()
        # torchao compiles its step for every shape; for how long it takes that would matter.
        with torch.compiler.set_stance("force_eager"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.taken += self.batch
        self.average.update(module, self.batch, self.taken)


# --- the section ----------------------------------------------------------------------------


def training(run: Run) -> Rows:
    """Samples a second, rung by rung, of the 700M; then the 1B as the recipe has it."""
    scene, first = Scene.of(run), 0.0
    with Foretold(run.toy) as foretold:
        for cut in CUTS:
            foretold.begin(plan_of(scene, cut, Hardware(), 1))
            foretold.begin(plan_of(scene, cut, Hardware(accumulate=2), 2))
        size = 0
        for row in public(scene):
            size = row.get("at_once", 0)
            first = first or row.get("samples_per_s", 0.0)
            yield row | {"times": row["samples_per_s"] / first} if size else row
        for cut in CUTS if size else ():
            for row in ours(scene, cut, size, run, foretold):
                own = cut == CUTS[0]
                yield row | {"times": row["samples_per_s"] / first} if own else row


def public(scene: Scene) -> Rows:
    """The way of public scripts, with as many samples at once as it can, and the first rungs."""
    sizes: Sequence[int] = (2,) if scene.toy else BATCHES
    for name, prepared, half in (
        ("as public scripts do it", False, scene.half),
        ("+ prepared latents", True, scene.half),
        ("+ bf16", True, torch.bfloat16),
    ):
        for size in sizes:
            measure.release(scene.device)
            try:
                found = timed(PublicWay(scene, CUTS[0], size, prepared, half), scene, CUTS[0])
            except torch.OutOfMemoryError:
                continue
            yield {"way": name, "student": CUTS[0], "at_once": size, **found}
            sizes = (size,)
            break
        else:
            yield {"way": name, "student": CUTS[0], "refused": f"not even {sizes[-1]} fit"}
            return


def ours(scene: Scene, cut: str, size: int, run: Run, foretold: Foretold) -> Rows:
    """Ours, eager and then compiled, at once and as the recipe has it; with fewer where it must."""
    rungs = [("+ compiled blocks", Hardware(compile=scene.compiler))]
    if cut == CUTS[0]:
        rungs.insert(0, ("+ channels_last, fused optimiser, taps as outputs", Hardware()))
    for name, hardware in rungs:
        work, found = None, None
        while found is None:
            del work  # before the next is made
            measure.release(scene.device)
            try:
                work = Ours(scene, cut, hardware, size)
                found = timed(work, scene, cut)
            except torch.OutOfMemoryError:
                work, size = None, size // 2
                if not size:
                    yield {"way": name, "student": cut, "refused": "not even one fits"}
                    return
        planned = {"planned_gb": foretold.bytes(work.plan) / GB}
        yield {"way": name, "student": cut, "at_once": size, **found, **planned}
    if run.left > 0:
        parts = 2 if scene.toy else max(1, A_STEP // size)
        work.resize(size * parts, parts)
        found = timed(work, scene, cut, warm=1, steps=2)
        planned = {"planned_gb": foretold.bytes(work.plan) / GB}
        name = f"+ {size * parts} samples a step"
        yield {"way": name, "student": cut, "at_once": size, **found, **planned}


def timed(work: Steps, scene: Scene, cut: str, warm: int = 2, steps: int = STEPS) -> Row:
    """Rate, share of the peak and memory of steps, once the first ones are over."""
    device, seconds = scene.device, list[float]()
    measure.reset_peak(device)
    for _ in range(warm + (1 if scene.toy else steps)):
        measure.synchronize(device)
        start = time.perf_counter()
        work.step()
        measure.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) > warm and sum(seconds[warm:]) > PATIENCE:
            break
    rate = work.batch / statistics.median(seconds[warm:])
    peak = measure.peak_bytes(device)
    return {
        "samples_per_s": rate,
        "share_of_peak": rate * scene.flops(cut) / scene.peak,
        "first_step_s": seconds[0],
        "loss": work.loss,  # random models', finite: a scaler leaves out steps that are not
        "peak_gb": None if peak is None else peak / GB,
    }
