"""LoRAs on live models: merged and apart, and as diffusers and PEFT themselves apply them."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from koala.errors import UserError
from koala.lora.adapters import Attached, merge, modules_of
from koala.lora.conversion import SPELLINGS, write_converted
from koala.lora.names import PARTS
from koala.lora.reading import read
from toy import TEXT_WIDTHS, TIME_EMBED, TOKENS, toy_pipeline, toy_unet
from toy_lora import toy_base, toy_lora


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "sdxl", seed=1)


@pytest.fixture(scope="module")
def koala(tmp_path_factory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "koala", seed=2, architecture="koala")


SDXL, KOALA = toy_base(toy_unet("sdxl")), toy_base(toy_unet("koala"))


@cache
def _pipeline(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder)


def pipeline_of(folder: Path) -> StableDiffusionXLPipeline:
    """The folder as diffusers loads it, with models that nobody else has."""
    loaded = _pipeline(folder).components
    own = {name: copy.deepcopy(loaded[name]) for name in PARTS}
    return StableDiffusionXLPipeline(**loaded | own, add_watermarker=False)


def models_of(folder: Path) -> tuple[torch.nn.Module, ...]:
    """The U-Net and both text encoders."""
    pipeline = pipeline_of(folder)
    return tuple(getattr(pipeline, part) for part in PARTS)


@torch.no_grad()
def outputs(unet, text_encoder, text_encoder_2) -> list[torch.Tensor]:
    """What a LoRA can change: the U-Net's prediction and the encoders' two kinds of output."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    added = {
        "text_embeds": noise(2, TEXT_WIDTHS[1]),
        "time_ids": torch.full((2, 6), float(TIME_EMBED)),
    }
    text = noise(2, TOKENS, sum(TEXT_WIDTHS))
    steps = torch.tensor([10, 900])
    sample = unet(
        noise(2, 4, 8, 8), steps, encoder_hidden_states=text, added_cond_kwargs=added
    ).sample
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS)
    first, second = (
        encoder(ids, output_hidden_states=True) for encoder in (text_encoder, text_encoder_2)
    )
    return [sample, first.hidden_states[-2], second.hidden_states[-2], second.text_embeds]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


# --- merged and apart -----------------------------------------------------------------------


def test_merged_and_apart_are_the_same_for_every_kind_of_module(sdxl, tmp_path):
    """All linear and convolutional modules of the U-Net and the text encoders at once."""
    file = toy_lora(tmp_path / "all.safetensors", SDXL, alpha=3)
    lora = read(file, SDXL)
    assert lora.report.applied == lora.report.modules == len(lora.adapters)
    apart, merged = models_of(sdxl), models_of(sdxl)
    before = outputs(*apart)
    assert set(modules_of(*apart)) == set(lora.adapters)
    Attached(modules_of(*apart), lora, 0.7)
    merge(modules_of(*merged), lora, 0.7)
    with_lora = outputs(*apart)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, with_lora, strict=True))
    assert difference(with_lora, outputs(*merged)) < 1e-5


def test_merging_adds_alpha_over_rank_times_up_down(sdxl, tmp_path):
    file = toy_lora(tmp_path / "one.safetensors", SDXL, alpha=3, rank=4)
    tensors = load_file(file)
    unet, *encoders = models_of(sdxl)
    old = {name: weight.clone() for name, weight in unet.state_dict().items()}
    merge(modules_of(unet, *encoders), read(file, SDXL), scale=0.5)
    new = unet.state_dict()
    stem, name = (
        "lora_unet_output_blocks_0_1_transformer_blocks_1_ff_net_2",
        ("up_blocks.0.attentions.0.transformer_blocks.1.ff.net.2.weight"),
    )
    change = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
    torch.testing.assert_close(new[name], old[name] + 0.5 * 3 / 4 * change)
    assert all(torch.equal(new[n], old[n]) for n in old if n.endswith(".bias") or "norm" in n)


def test_removing_leaves_no_trace_and_a_scale_can_change(sdxl, tmp_path):
    lora = read(toy_lora(tmp_path / "all.safetensors", SDXL), SDXL)
    models = models_of(sdxl)
    weights = [{n: w.clone() for n, w in model.state_dict().items()} for model in models]
    before = outputs(*models)
    attached = Attached(modules_of(*models), lora, 1.0)
    at_one = outputs(*models)
    attached.scale = 0.0
    assert difference(outputs(*models), before) == 0
    attached.scale = 1.0
    assert difference(outputs(*models), at_one) == 0
    attached.remove()
    assert difference(outputs(*models), before) == 0
    for model, old in zip(models, weights, strict=True):
        assert all(torch.equal(w, old[n]) for n, w in model.state_dict().items())


def test_several_at_once_merged_or_apart(sdxl, tmp_path):
    """Their sum, whatever the order."""
    first = read(toy_lora(tmp_path / "a.safetensors", SDXL, seed=1), SDXL)
    second = read(toy_lora(tmp_path / "b.safetensors", SDXL, "PEFT", rank=3, seed=2), SDXL)
    apart, merged = models_of(sdxl), models_of(sdxl)
    one, _ = (Attached(modules_of(*apart), lora, s) for lora, s in ((first, 1.0), (second, -0.6)))
    for lora, scale in ((second, -0.6), (first, 1.0)):
        merge(modules_of(*merged), lora, scale)
    assert difference(outputs(*apart), outputs(*merged)) < 1e-5
    one.remove()
    alone = models_of(sdxl)
    merge(modules_of(*alone), second, -0.6)
    assert difference(outputs(*apart), outputs(*alone)) < 1e-5


def test_a_tucker_convolution_is_up_mid_down(sdxl, tmp_path):
    """LyCORIS' lora_mid: the product of three is one kernel, merged or as three convolutions."""
    stem, out, into, rank = "lora_unet_input_blocks_3_0_op", 16, 16, 3
    g = torch.Generator().manual_seed(0)
    shapes = {"down": (rank, into, 1, 1), "mid": (rank, rank, 3, 3), "up": (out, rank, 1, 1)}
    tensors = {
        f"{stem}.lora_{role}.weight": 0.3 * torch.randn(shape, generator=g)
        for role, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "tucker.safetensors")
    lora = read(tmp_path / "tucker.safetensors", SDXL)
    apart, merged = models_of(sdxl), models_of(sdxl)
    before = outputs(*apart)
    Attached(modules_of(*apart), lora)
    merge(modules_of(*merged), lora)
    assert difference(outputs(*apart), before) > 1e-3
    assert difference(outputs(*apart), outputs(*merged)) < 1e-5


def test_half_precision_merges_in_single(sdxl, tmp_path):
    """The sum is rounded once, not its terms."""
    lora = read(toy_lora(tmp_path / "all.safetensors", SDXL), SDXL)
    half = [model.to(torch.float16) for model in models_of(sdxl)]
    exact = [copy.deepcopy(model).float() for model in half]
    for models in (half, exact):
        merge(modules_of(*models), lora, 0.3)
    for rounded, whole in zip(half, exact, strict=True):
        weights = rounded.state_dict()
        assert all(torch.equal(weights[n], w.half()) for n, w in whole.state_dict().items())


def test_what_cannot_be_merged_is_said(sdxl, tmp_path):
    file = toy_lora(tmp_path / "a.safetensors", SDXL)
    models = [model.to(torch.float16) for model in models_of(sdxl)]
    with pytest.raises(UserError, match=r"a\.safetensors at scale 1e\+09 overflows"):
        merge(modules_of(*models), read(file, SDXL), 1e9)
    tensors = load_file(file)
    tensors[next(n for n in tensors if n.endswith("up.weight"))][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match="has NaN or infinite"):
        merge(modules_of(*models_of(sdxl)), read(file, SDXL))


# --- as diffusers and PEFT do it ------------------------------------------------------------


def diffusers_outputs(folder: Path, file: Path) -> list[torch.Tensor]:
    """The same outputs after diffusers' own `load_lora_weights`."""
    pipe = pipeline_of(folder)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return outputs(pipe.unet, pipe.text_encoder, pipe.text_encoder_2)


def our_outputs(folder: Path, file: Path, base, teacher=None) -> list[torch.Tensor]:
    models = models_of(folder)
    Attached(modules_of(*models), read(file, base, teacher))
    return outputs(*models)


def diffusers_knows(target) -> bool:
    """Diffusers loads no LoRA of the second text encoder's projection, and misreads kohya's
    `add_embedding` where it is spelled as diffusers itself names it."""
    return target.path != "text_projection" and "add_embedding" not in target.path


@pytest.mark.parametrize(
    ("form", "alpha"),
    [("kohya", 1.0), ("kohya of diffusers", 1.0), ("diffusers", None), ("PEFT", None),
     ("old diffusers", None)],
)  # fmt: skip
def test_a_teachers_lora_gives_what_diffusers_gives(sdxl, tmp_path, form, alpha):
    file = toy_lora(tmp_path / "a.safetensors", SDXL, form, diffusers_knows, rank=4, alpha=alpha)
    ours = our_outputs(sdxl, file, SDXL)
    assert difference(ours, outputs(*models_of(sdxl))) > 1e-3
    assert difference(ours, diffusers_outputs(sdxl, file)) < 1e-5


@pytest.mark.parametrize(
    ("form", "alpha"),
    [("kohya", 1.0), ("kohya of diffusers", 1.0), ("diffusers", None), ("PEFT", None),
     ("old diffusers", None)],
)  # fmt: skip
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_converted_lora_loads_in_diffusers_on_the_student(koala, tmp_path, form, alpha, spelling):
    """What the file for the student does there, for diffusers, is what we carry over."""
    (tmp_path / "out").mkdir()
    file = toy_lora(tmp_path / "a.safetensors", SDXL, form, diffusers_knows, rank=4, alpha=alpha)
    lora = read(file, KOALA, SDXL.unet)
    assert lora.report.dropped
    write_converted(lora, tmp_path / "out" / "b.safetensors", spelling)
    ours = our_outputs(koala, file, KOALA, SDXL.unet)
    assert difference(ours, outputs(*models_of(koala))) > 1e-3
    assert difference(ours, diffusers_outputs(koala, tmp_path / "out" / "b.safetensors")) < 1e-5
    own = read(tmp_path / "out" / "b.safetensors", KOALA, SDXL.unet)
    assert own.made_for == KOALA and not own.report.dropped
    assert own.report.applied == lora.report.applied


def test_pefts_own_file_and_settings_are_read_and_carried(sdxl, koala, tmp_path):
    """Trained with PEFT, saved by diffusers: ranks and alphas are in the metadata alone."""
    unet = models_of(sdxl)[0]
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_out.0", "conv1", "proj_in"],
        rank_pattern={"up_blocks.1.attentions.2.proj_in": 3, "mid_block.resnets.0.conv1": 2},
        alpha_pattern={"up_blocks.1.attentions.2.proj_in": 7, "conv1": 5},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    unet.add_adapter(config)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )
    file, encoders = tmp_path / "pytorch_lora_weights.safetensors", models_of(sdxl)[1:]
    ours = our_outputs(sdxl, file, SDXL)
    assert difference(ours, outputs(unet, *encoders)) < 1e-5
    assert difference(ours, outputs(*models_of(sdxl))) > 1e-3
    (tmp_path / "out").mkdir()
    lora = read(file, KOALA, SDXL.unet)
    write_converted(lora, tmp_path / "out" / "b.safetensors")
    ours = our_outputs(koala, file, KOALA, SDXL.unet)
    assert difference(ours, diffusers_outputs(koala, tmp_path / "out" / "b.safetensors")) < 1e-5
    again = our_outputs(koala, tmp_path / "out" / "b.safetensors", KOALA)
    assert difference(ours, again) == 0


def test_a_peft_folder_is_read_and_carried_with_its_settings(sdxl, koala, tmp_path):
    unet = models_of(sdxl)[0]
    config = LoraConfig(r=4, lora_alpha=9, target_modules=["to_k"], init_lora_weights=False)
    torch.manual_seed(0)
    trained = get_peft_model(unet, config)
    trained.save_pretrained(tmp_path / "peft")
    file, encoders = tmp_path / "peft" / "adapter_model.safetensors", models_of(sdxl)[1:]
    assert difference(our_outputs(sdxl, file, SDXL), outputs(trained, *encoders)) < 1e-5
    lora = read(file, KOALA, SDXL.unet)
    with pytest.raises(UserError, match=r"name the output adapter_model\.safetensors"):
        write_converted(lora, tmp_path / "b.safetensors", "same")
    write_converted(lora, tmp_path / "out" / "adapter_model.safetensors", "same")
    student = PeftModel.from_pretrained(models_of(koala)[0], tmp_path / "out")
    theirs = outputs(student, *models_of(koala)[1:])
    assert difference(our_outputs(koala, file, KOALA, SDXL.unet), theirs) < 1e-5
