"""A training in bf16 on a processor: what it rounds, what it does not, and where it is refused."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from koala.distillation.forward_process import Noised, predict
from koala.distillation.loop import train
from koala.distillation.parallel import Layout, World, alone, lay_out
from koala.distillation.precision import LossScale, computing
from koala.distillation.settings import Hardware
from koala.errors import UserError
from koala.generation.denoise import Condition
from koala.generation.runtime.pytorch import predictor
from toy import TEXT_WIDTHS, TIME_EMBED, toy_unet
from toy_training import STEP, Stream, distil, gradient, norm, toy_distillation, toy_task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with bf16: others give the same numbers, slower."""
    monkeypatch.setattr("koala.distillation.parallel.has_bf16", lambda: True)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def test_products_are_in_bf16_attention_and_group_norm_in_float32() -> None:
    x, w = drawn(4, 8).bfloat16(), drawn(8)
    heads = drawn(2, 2, 6, 8).bfloat16()
    with computing(CPU, torch.bfloat16):
        assert F.linear(drawn(3, 8), drawn(5, 8)).dtype == torch.bfloat16
        normed = F.group_norm(x, 2, w)
        mixed = F.scaled_dot_product_attention(heads, heads, heads)
    assert torch.equal(normed, F.group_norm(x.float(), 2, w).bfloat16())
    whole = heads.float()
    assert torch.equal(mixed, F.scaled_dot_product_attention(whole, whole, whole).bfloat16())
    with computing(CPU, torch.float32):
        assert F.linear(drawn(3, 8), drawn(5, 8)).dtype == torch.float32


def test_gradients_are_float32_and_near_those_of_float32() -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8))
    other, x = copy.deepcopy(layer), drawn(2, 4, 8, 8)
    for network, dtype in ((layer, torch.float32), (other, torch.bfloat16)):
        with computing(CPU, dtype):
            loss = (network(x).float() * x[:, :, :6, :6].repeat(1, 2, 1, 1)).mean()
        loss.backward()
    for exact, rounded in zip(layer.parameters(), other.parameters(), strict=True):
        assert rounded.grad.dtype == torch.float32
        assert (rounded.grad - exact.grad).norm() < 0.02 * exact.grad.norm() + 1e-6


def test_a_run_learns_in_it_and_goes_on_without_it(base, tmp_path) -> None:
    step, run = tmp_path / "step", tmp_path / "run"
    distil(base, step, settings=STEP)
    distil(base, run, Hardware(cpu_bf16=True), settings=STEP)
    exact, rounded = gradient(step), gradient(run)
    difference = {name: rounded[name] - exact[name] for name in exact}
    assert 0 < norm(difference) < 0.02 * norm(exact)
    before = norm(rounded)
    distil(base, run, settings=STEP)  # the same run, at its end: nothing is trained again
    assert norm(gradient(run)) == before


@pytest.mark.parametrize(
    ("hardware", "device", "message"),
    [
        (Hardware(cpu_bf16=True), "cuda", "training on a GPU uses bf16 anyway"),
        (Hardware(cpu_bf16=True, checkpointing=True), "cpu", "supports neither checkpointing"),
        (Hardware(cpu_bf16=True, compile="aot_eager"), "cpu", "nor compile"),
        (Hardware(fp16=True), "cpu", "fp16=true: it is for GPUs, and this run is on cpu"),
    ],
)
def test_where_it_cannot_be_it_is_refused(base, hardware, device, message) -> None:
    with pytest.raises(UserError, match=message):
        lay_out(toy_task(base), hardware, World(device=torch.device(device)))


def test_a_training_of_its_own_is_asked_the_same() -> None:
    with pytest.raises(UserError, match="training on a GPU uses bf16 anyway"):
        alone("cuda", cpu_bf16=True)
    assert not alone("cuda", cpu_bf16=False).hardware.cpu_bf16


def test_a_processor_without_bf16_is_named(base, monkeypatch) -> None:
    monkeypatch.setattr("koala.distillation.parallel.has_bf16", lambda: False)
    with pytest.raises(UserError, match="has no bf16 instructions"):
        lay_out(toy_task(base), Hardware(cpu_bf16=True), World(device=CPU))
    with pytest.raises(UserError, match="has no bf16 instructions"):
        alone("cpu", cpu_bf16=True)


def test_teacher_and_student_are_told_the_same_sizes_and_timesteps(base) -> None:
    """At the sizes of real images: bf16 would change 83 % of the integers from 512 to 2048."""
    sizes = torch.tensor(
        [[1274.0, 1457, 0, 91, 1024, 1024], [513, 2047, 0, 769, 640, 1536]]
    )  # of the image, of the crop, of the bucket
    ticks = torch.tensor([999, 261])
    text, pooled = drawn(2, 7, sum(TEXT_WIDTHS)), drawn(2, TEXT_WIDTHS[1])
    batch = Noised(drawn(2, 4, 8, 8), ticks, text, pooled, sizes)
    exact = get_timestep_embedding(sizes.flatten(), TIME_EMBED, True, 0)
    told = {}
    for name, dtype in (("sdxl", torch.bfloat16), ("koala", torch.float32)):
        unet, heard = nn.Module.to(toy_unet(name), dtype), told.setdefault(name, [])
        for part in (unet.add_time_proj, unet.time_proj):
            part.register_forward_hook(lambda _, __, output, heard=heard: heard.append(output))
        with computing(CPU, torch.bfloat16 if dtype == torch.float32 else torch.float32):
            assert predict(unet, batch, dtype).isfinite().all()
        if dtype == torch.bfloat16:  # as in generation
            predictor(unet)(batch.noisy, ticks.float(), Condition(text, pooled, sizes))
    teacher, student = told["sdxl"], told["koala"]
    assert len(teacher) == 4 and len(student) == 2
    for ours, theirs in zip(teacher, student * 2, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(exact, student[1])


# --- fp16, on GPUs without bf16 ------------------------------------------------------------


def run_in(dtype: torch.dtype, base: Path, run: Path) -> dict[str, Tensor]:
    """A step's gradient; a processor stands in for such a GPU."""
    train(
        toy_distillation(base),
        Stream(),
        replace(STEP, validate_every=0),
        run,
        layout=Layout(dtype=dtype),
    )
    return gradient(run)


def test_a_step_in_fp16_is_near_that_in_float32(base, tmp_path) -> None:
    exact = run_in(torch.float32, base, tmp_path / "exact")
    rounded = run_in(torch.float16, base, tmp_path / "rounded")
    difference = {name: rounded[name] - exact[name] for name in exact}
    assert 0 < norm(difference) < 0.01 * norm(exact)


def test_fp16_may_be_asked_for_on_any_gpu(base) -> None:
    """A layout for a GPU needs none at hand."""
    task = toy_distillation(base)
    layout = lay_out(task, Hardware(fp16=True), World(device=torch.device("cuda")))
    assert layout.dtype == torch.float16 and task.teacher is not None
    assert {p.dtype for p in task.teacher.parameters()} == {torch.float16}
    assert {p.dtype for p in task.trainable.parameters()} == {torch.float32}


def test_gradients_too_small_for_fp16_are_kept_and_too_large_ones_are_computed_again() -> None:
    """The weight's gradient is `size`; unscaled, fp16 has nothing below 6e-8 or above 65504."""
    for size, scaled in ((2.0**-30, 2.0**16), (2.0**4, 2.0**11)):
        layer, scale = nn.Linear(1, 1, bias=False), LossScale(torch.float16)
        while True:
            layer.zero_grad()
            with computing(CPU, torch.float16):
                loss = layer(torch.ones(1, 1)).float().sum() * size
            (loss * scale.value).backward()
            scale.divide(layer.parameters())
            assert layer.weight.grad is not None
            if not scale.overflowed(layer.weight.grad.norm().item()):
                break
        assert (layer.weight.grad.item(), scale.value) == (size, scaled)


def test_the_scale_grows_after_many_steps_and_gives_up_at_1() -> None:
    scale = LossScale(torch.float16)
    for _ in range(LossScale.PATIENCE):
        assert not scale.overflowed(1.0)
    assert scale.value == 2 * LossScale.FIRST
    tries = 0
    while scale.overflowed(float("nan")):
        tries += 1
    assert (tries, scale.value) == (17, 1.0)


def test_other_precisions_have_no_scale() -> None:
    scale = LossScale(torch.bfloat16)
    assert not scale.overflowed(float("inf")) and scale.value == 1
