"""Plans before anything is loaded: costs, the choice within a budget, the ladder, free memory."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import koala
from koala.architectures.layout import parameters
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.validate import read_tensors, unet_architecture
from koala.errors import UserError
from koala.generation.memory.meta_models import TEXT, TINY, UNET, VAE
from koala.generation.memory.peak import peak_bytes
from koala.generation.memory.plan import GIB, GROWTH, LADDER, Planner, free_bytes
from koala.generation.validation import budget
from toy import toy_pipeline, toy_tiny

CPU = torch.device("cpu")
MINI = BUNDLED / "koala-mini"


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(MINI, CPU, (64, 64))


@pytest.fixture(scope="module")
def with_tiny(tmp_path_factory) -> Path:
    folder = toy_pipeline(tmp_path_factory.mktemp("toy") / "koala", architecture="koala")
    toy_tiny().save_pretrained(folder / "vae_tiny")
    return folder


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_activations_are_what_is_alive_at_once():
    x = meta(1000)  # 4,000 bytes, there before: not counted

    def chain():
        y = x + 1  # 4,000
        z = y * 2  # 8,000
        del y
        return z.view(10, 100).relu_() + 1  # a view and an in-place change: 8,000 again

    assert peak_bytes(chain) == 8_000
    assert peak_bytes(lambda: [x + i for i in range(5)]) == 20_000
    assert peak_bytes(lambda: None) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_never_holds_its_scores(dtype):
    q = torch.empty(2, 10, 4096, 64, dtype=dtype, device="meta")
    peak = peak_bytes(lambda: F.scaled_dot_product_attention(q, q, q))
    assert q.nbytes <= peak < 1.1 * q.nbytes


def test_weights_are_counted_from_the_configs_as_the_files_hold_them(planner):
    plan = planner.plan(planner.modes[0])
    assert plan.mode.weights == "fp32"
    for part, component in ((UNET, "unet"), (VAE, "vae")):
        stored = read_tensors(MINI, component)
        count = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
        padding = 256 * len(stored)
        assert 4 * count <= plan.parts[part] <= 4 * count + padding
    assert 4 * parameters(unet_architecture(MINI)) <= plan.parts[UNET]


def test_every_row_of_the_ladder_and_what_it_saves(planner):
    plans = [planner.plan(mode) for mode in planner.modes]
    ways = [(p.mode.quantised, p.mode.place, p.mode.decode) for p in plans]
    assert ways == list(LADDER)
    plain, strips, read, packed, turns, _, _ = plans
    by_phase = [{phase.name: phase for phase in plan.phases} for plan in plans]
    assert by_phase[1]["decode"].activations < by_phase[0]["decode"].activations
    assert packed.parts[UNET] < 0.3 * plain.parts[UNET]
    assert packed.parts[TEXT] < plain.parts[TEXT]
    away = read.parts[TEXT] - by_phase[2]["denoise"].weights + read.parts[UNET] + read.parts[VAE]
    assert 0.9 * read.parts[TEXT] < away <= read.parts[TEXT]  # while the U-Net works
    for phase in ("encode", "denoise", "decode"):
        assert by_phase[4][phase].weights < by_phase[3][phase].weights
    assert by_phase[5]["denoise"].weights < by_phase[4]["denoise"].weights
    assert strips.peak <= plain.peak and turns.peak < packed.peak < strips.peak
    assert planner.smaller(plain) == strips
    assert planner.smaller(turns) is None  # streaming wants room for two units of the text side


def test_the_first_plan_that_fits_is_chosen(planner):
    plans = [planner.plan(mode) for mode in planner.modes]
    for plan in plans:
        first = next(other for other in plans if other.peak <= plan.peak)
        assert planner.choose(plan.peak).mode == first.mode
    assert planner.choose().mode == planner.modes[0]
    least = min(planner.plan(mode).peak for mode in planner.modes)
    with pytest.raises(UserError, match=r"64x64 pixels, 1 at a time: the smallest that works is"):
        planner.choose(least - 1)


def test_the_budget_that_is_named_works(planner):
    with pytest.raises(UserError) as caught:
        planner.choose(1)
    named = float(str(caught.value).split("works is ")[1].split(" GiB")[0])
    assert planner.choose(budget(named)).peak <= named * GIB


def test_more_images_and_larger_ones_take_more(planner):
    plain = planner.modes[0]
    one = planner.plan(plain)
    for other in (Planner(MINI, CPU, (128, 64)), Planner(MINI, CPU, (64, 64), images=2)):
        for small, large in zip(one.phases[1:], other.plan(plain).phases[1:], strict=True):
            assert 1.7 * small.activations < large.activations < 2.3 * small.activations


def test_images_to_start_from_are_planned(planner):
    """A phase more, of the VAE; in strips wherever it decodes in strips."""
    given = Planner(MINI, CPU, (64, 64), from_image=True)
    for plain, mode in zip(planner.modes, given.modes, strict=True):
        plan, without = given.plan(mode), planner.plan(plain)
        assert [phase.name for phase in plan.phases] == ["encode", "picture", "denoise", "decode"]
        assert (plan.phases[0], *plan.phases[2:]) == without.phases
        decodes = plan.phases[-1]
        if mode.decode != "tiny":  # the VAE's encoder reads the picture all the same
            assert plan.phases[1].weights == decodes.weights
            assert plan.phases[1].activations <= 1.1 * decodes.activations
    assert "picture" in given.plan(given.modes[0]).table()


def test_what_is_asked_for_stays_on_every_row(with_tiny):
    exact = Planner(with_tiny, CPU, (64, 64), weights="fp32").modes
    assert {mode.quantised for mode in exact} == {None}
    assert [mode.place for mode in exact] == [
        "resident", "resident", "text group offload", "model offload", "group offload",
        "group offload",
    ]  # fmt: skip
    packed = Planner(with_tiny, CPU, (64, 64), weights="fp8").modes
    assert {mode.weights for mode in packed} == {"fp8"}
    tiny = Planner(with_tiny, CPU, (64, 64), decode="tiny")
    assert {mode.decode for mode in tiny.modes} == {"tiny"}
    plan = tiny.plan(tiny.modes[0])
    assert 0 < plan.parts[TINY] < plan.parts[VAE]
    assert Planner(with_tiny, CPU, (64, 64)).modes[-1].decode == "tiny"


def test_dtypes_by_device(with_tiny, monkeypatch):
    metal = Planner(with_tiny, torch.device("mps"), (64, 64))
    assert {(m.dtype, m.vae_dtype) for m in metal.modes} == {("fp16", "fp16")}
    monkeypatch.setattr("koala.generation.runtime.dtypes.has_bf16", lambda: True)
    assert {m.vae_dtype for m in Planner(with_tiny, CPU, (64, 64), weights="bf16").modes} == {
        "fp32"
    }
    monkeypatch.setattr("koala.generation.runtime.dtypes.has_bf16", lambda: False)
    with pytest.raises(UserError, match="bfloat16: this CPU has none"):
        Planner(with_tiny, CPU, (64, 64), weights="bf16")
    with pytest.raises(UserError, match="float16: no CPU computes in it"):
        Planner(with_tiny, CPU, (64, 64), weights="fp16")
    with pytest.raises(UserError, match="MPS has no such type"):
        Planner(with_tiny, torch.device("mps"), (64, 64), weights="fp8")


def test_what_is_asked_wrongly_is_refused(tmp_path):
    for arguments, message in (
        ({"weights": "int3"}, "unknown weights 'int3': choose fp32, fp16, bf16, int8, fp8, int4"),
        ({"decode": "none"}, "unknown decoder 'none': choose full, tiled, tiny"),
        ({"tiny": tmp_path}, "no tiny autoencoder"),
    ):
        with pytest.raises(UserError, match=message):
            Planner(MINI, CPU, (64, 64), **arguments)
    for vram in (0, -1, float("nan"), float("inf"), True, "four", "-4", None):
        with pytest.raises(UserError, match="vram is"):
            budget(vram)
    assert budget(0.5) == budget("0.5") == 2**29


def test_free_memory_is_some_of_the_machines():
    assert 2**24 < free_bytes(CPU) < 2**45


def test_a_budget_on_a_cpu_holds_the_process(toy_sdxl):
    """It is that of a container: what the interpreter and its libraries take is in it."""
    plan = koala.load(toy_sdxl, "cpu", vram=8, size="64x64").plan
    assert plan.process > GROWTH + 2**26  # torch alone takes more
    assert plan.total == plan.peak + plan.process
    assert "interpreter and libraries, beside each phase" in plan.table()
    process = 2**30
    planner = Planner(toy_sdxl, CPU, (64, 64), process=process)
    least = planner.plan(planner.modes[0]).peak + process
    assert planner.choose(least).mode == planner.modes[0]
    with pytest.raises(UserError, match=r"the smallest that works is 1\.\d\d GiB"):
        planner.choose(process)


def test_the_table_says_where_everything_is(planner):
    plan = planner.choose(planner.plan(planner.modes[4]).peak)
    lines = plan.table().splitlines()
    assert lines[0].startswith("memory plan for 64x64, 1 picture at a time, on cpu: ")
    assert [line.split("  ")[0] for line in lines[2:5]] == [TEXT, UNET, VAE]
    assert all("model offload" in line for line in lines[2:5]) and "in tiles" in lines[4]
    sums = [float(line.split()[3]) for line in lines[-3:]]
    assert [line.split()[0] for line in lines[-3:]] == ["encode", "denoise", "decode"]
    read = planner.plan(planner.modes[2]).table().splitlines()[2:5]
    assert [line.split("  ")[-1].split(",")[0] for line in read] == [
        "group offload", "resident", "resident",
    ]  # fmt: skip
    marked = [line.endswith("<- largest") for line in lines[-3:]]
    assert marked[sums.index(max(sums))] and sum(marked) == 1
