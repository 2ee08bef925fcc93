"""ControlNets: equal to diffusers' on SDXL, and on a student what the block map leaves."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from koala.architectures.config import from_unet_config
from koala.checkpoints.controlnet import open_controlnet
from koala.errors import UserError
from koala.generation import load, read_settings, save
from koala.generation.control import fitted
from koala.generation.denoise import Condition, Hint
from koala.generation.loader import _giving_way
from koala.generation.png import parameters
from koala.generation.runtime.pytorch import predictor, residuals_of
from koala.generation.workflow import workflow
from stepping import assert_drawn_together_as_alone, latents_of
from toy import toy_inputs, toy_unet
from toy_controlnet import saved, toy_controlnet

SIDE = 64
ASKED = {"negative_prompt": "blur", "guidance": 4, "steps": 4, "seed": 11}
WEIGHTS = "diffusion_pytorch_model.safetensors"
READ = [0, 2, 3, 5, 6, 8]  # of 9: what the up resnets that are left read in the teacher


@pytest.fixture(scope="module")
def net(toy_sdxl):
    return toy_controlnet(StableDiffusionXLPipeline.from_pretrained(toy_sdxl).unet)


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    return saved(net, tmp_path_factory.mktemp("net") / "edges")


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return Image.fromarray(pixels)


@torch.inference_mode()
def drawn(pipe, **asked):
    return latents_of(pipe, "a red fox", **{**ASKED, **asked})


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_on_sdxl_it_equals_diffusers(toy_sdxl, net, folder, image, scale):
    ours = load(toy_sdxl, "cpu")
    draws = torch.Generator().manual_seed(11)
    theirs = StableDiffusionXLControlNetPipeline.from_pretrained(
        toy_sdxl,
        controlnet=net,
        scheduler=EulerDiscreteScheduler.from_config(ours.scheduler_config),
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red fox", negative_prompt="blur", image=image, controlnet_conditioning_scale=scale,
        guidance_scale=4.0, num_inference_steps=4, generator=[draws], output_type="latent",
    ).images  # fmt: skip
    x = drawn(ours, control=folder, control_image=image, control_scale=scale)
    bound = 1e-4 * (expected.max() - expected.min()).item()
    torch.testing.assert_close(x, expected, atol=bound, rtol=0)
    assert (drawn(ours) - x).abs().max() > 100 * bound


def test_a_single_file_is_read_as_its_folder_is(toy_sdxl, folder, image, tmp_path):
    file = shutil.copy(folder / WEIGHTS, tmp_path / "edges.safetensors")
    pipe = load(toy_sdxl, "cpu")
    found = [drawn(pipe, control=it, control_image=image) for it in (folder, file)]
    torch.testing.assert_close(*found, atol=0, rtol=0)
    arch = pipe.known.base.unet
    built, config = open_controlnet(file).settings(arch), open_controlnet(folder).settings(arch)
    assert {k: v for k, v in config.items() if k in built} == built


def test_halved_and_sharded_weights_are_read(toy_sdxl, net, image, tmp_path):
    net.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    net.save_pretrained(tmp_path / "halves", variant="fp16")
    pipe = load(toy_sdxl, "cpu")
    found = [drawn(pipe, control=tmp_path / it, control_image=image) for it in ("shards", "halves")]
    torch.testing.assert_close(*found, atol=0, rtol=0)


@torch.inference_mode()
def test_on_a_student_the_residuals_are_those_of_the_blocks_that_it_has(toy_koala, net, folder):
    unet = load(toy_koala, "cpu").unet
    control = fitted(folder, "toy", load(toy_koala, "cpu").known.base.unet)
    assert control.takes == (*READ, 9)
    assert control.line() == (
        "ControlNet edges: 7 of 10 residuals are used; left out: down_blocks.0.resnets.0, "
        "down_blocks.1.resnets.0, down_blocks.2.resnets.0"
    )
    given = toy_inputs()
    x, ticks, text = given["sample"], given["timestep"], given["encoder_hidden_states"]
    added = given["added_cond_kwargs"]
    seen = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor([1.0, 0.5])
    down, mid = net(x, ticks, text, seen, added_cond_kwargs=added, return_dict=False)
    assert len(down) == 9
    own = [scale.view(2, 1, 1, 1) * down[i] for i in READ]
    expected = unet(
        x, ticks, text, added_cond_kwargs=added, down_block_additional_residuals=own,
        mid_block_additional_residual=scale.view(2, 1, 1, 1) * mid,
    ).sample  # fmt: skip
    hint = Hint(residuals_of(net, control.takes), seen, scale)
    condition = Condition(text, added["text_embeds"], added["time_ids"], hint=hint)
    torch.testing.assert_close(predictor(unet)(x, ticks, condition), expected, atol=0, rtol=0)


def test_scale_0_is_the_plain_image(toy_koala, folder, image):
    pipe = load(toy_koala, "cpu")
    off = drawn(pipe, control=folder, control_image=image, control_scale=0)
    torch.testing.assert_close(off, drawn(pipe), atol=0, rtol=0)
    assert (drawn(pipe, control=folder, control_image=image) - off).abs().max() > 1e-2


def test_in_one_batch_each_image_is_its_own(toy_sdxl, net, folder, image, tmp_path):
    """With a ControlNet, with another image and scale, with another ControlNet, and with none."""
    pipe = load(toy_sdxl, "cpu")
    other = saved(toy_controlnet(pipe.unet, seed=1), tmp_path / "depths")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    kinds = [
        {"control": folder, "control_image": image},
        {"control": folder, "control_image": turned, "control_scale": 0.5},
        {"control": other, "control_image": image},
        {},
    ]
    requests = [pipe.requests("a fox", **{**ASKED, **kind})[0] for kind in kinds]
    assert_drawn_together_as_alone(pipe, requests)


def test_another_backend_gives_way_to_pytorch(toy_koala, folder, image):
    pipe = load(toy_koala, "cpu")
    expected, plain = drawn(pipe, control=folder, control_image=image), drawn(pipe)
    calls = []

    def other(*given):
        calls.append(given)
        return predictor(pipe.unet)(*given)

    pipe.predict = pipe._plain = _giving_way(pipe, other)
    found = drawn(pipe, control=folder, control_image=image)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert not calls
    torch.testing.assert_close(drawn(pipe), plain, atol=0, rtol=0)
    assert len(calls) == ASKED["steps"]


def test_an_image_says_what_it_was_drawn_by(toy_koala, folder, image, tmp_path):
    pipe = load(toy_koala, "cpu")
    result = pipe("a fox", steps=1, seed=1, control=folder, control_image=image, control_scale=0.5)
    (path,) = save(result, tmp_path)
    settings = read_settings(path)
    assert (settings.control, settings.control_scale) == ("edges", 0.5)
    assert settings.control_image == settings.control_image.lower() != ""
    assert parameters(settings).endswith('ControlNet 0: "Model: edges, Weight: 0.5"')
    with pytest.raises(UserError, match="without a ControlNet: leave out --workflow"):
        workflow(settings)


def test_a_transparent_control_image_lies_on_black(toy_koala, folder):
    pipe = load(toy_koala, "cpu")
    clear, black = Image.new("RGBA", (SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE))
    found = [drawn(pipe, control=folder, control_image=it, steps=1) for it in (clear, black)]
    torch.testing.assert_close(*found, atol=0, rtol=0)


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"control_image": "edges.png"}, "a control image has no effect without a ControlNet"),
        ({"control_scale": 0.5}, "a control scale has no effect without a ControlNet"),
        ({"control": "NET"}, "needs a control image"),
        ({"control": "NET", "control_image": "IMAGE", "control_scale": 2.5}, "allowed are numbers"),
        ({"control": "NET", "control_image": "IMAGE", "control_scale": True}, "control scale is"),
        ({"control": "NET", "control_image": "IMAGE", "control_scale": float("nan")}, "is nan"),
        ({"control": "no/such/net", "control_image": "IMAGE"}, "no/such/net does not exist"),
        ({"control": "NET", "control_image": "WIDE"}, "is 64x32, the image 64x64"),
        ({"control": "NET", "control_image": "gone.png"}, "gone.png cannot be read"),
        ({"control": "MODEL", "control_image": "IMAGE"}, "is a model, not a ControlNet"),
    ],
)
def test_what_is_asked_wrongly_is_refused(toy_koala, folder, image, asked, says):
    wide = Image.new("RGB", (64, 32))
    named = {"NET": folder, "IMAGE": image, "WIDE": wide, "MODEL": toy_koala}
    asked = {key: named.get(value, value) for key, value in asked.items()}
    with pytest.raises(UserError, match=says):
        load(toy_koala, "cpu").requests("a fox", **asked)


def test_a_net_for_another_model_is_refused_by_what_differs(toy_koala, net, folder, tmp_path):
    unet = load(toy_koala, "cpu").known.base.unet
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    changed = {
        "its text embeddings are 24 wide, toy needs 40": {"cross_attention_dim": 24},
        "its pooled text and sizes are 84 wide, toy needs 72": {
            "projection_class_embeddings_input_dim": 84
        },
        "its residuals are 16, 16, 16, 16, 48": {"block_out_channels": (16, 48, 32)},
        "no addition embedding": {"addition_embed_type": None},
        "takes images of 4 channels": {"conditioning_channels": 4},
        "reads its image at 1/4": {"conditioning_embedding_out_channels": (4, 8, 8)},
    }
    for i, (says, settings) in enumerate(changed.items()):
        other = saved(ControlNetModel.from_config({**config, **settings}), tmp_path / str(i))
        with pytest.raises(UserError, match=says):
            fitted(other, "toy", unet)
    single = saved(ControlNetModel.from_config({**config, "layers_per_block": 1}), tmp_path / "one")
    assert fitted(single, "toy", unet).takes == (0, 1, 2, 3, 4, 5, 6)
    with pytest.raises(UserError, match="a U-Net of 1 layers a stage; big has 2"):
        fitted(single, "big", from_unet_config(toy_unet("sdxl").config))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["control_model.input_blocks.0.0.weight"], "names of the original ldm code"),
        (["input_hint_block.0.weight"], "names of the original ldm code"),
        (["lora_controlnet", "x.weight"], "a Control-LoRA"),
        (["control_add_embedding.linear_1.weight"], "a ControlNet Union"),
        (["unet.mid.lora_down.weight"], "a LoRA, .* not a ControlNet"),
        (["something.weight"], "an unknown kind of model, not a ControlNet"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, names, says):
    file = tmp_path / "net.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    with pytest.raises(UserError, match=says):
        open_controlnet(file)


def test_a_folder_without_a_config_says_what_it_is(tmp_path):
    for file, says in ((None, "an empty folder"), ("canny.safetensors", "a folder of files: give")):
        if file:
            (tmp_path / file).touch()
        with pytest.raises(UserError, match=rf"is no ControlNet's folder \({says}.*\): give the"):
            open_controlnet(tmp_path)


def test_a_damaged_net_is_refused(toy_koala, folder, image, tmp_path):
    pipe = load(toy_koala, "cpu")

    def refused(net, says):
        with pytest.raises(UserError, match=says):
            pipe("a fox", steps=1, control=net, control_image=image)

    tensors = load_file(folder / WEIGHTS)
    for name, says in (("controlnet_mid_block.bias", "do not fit"), ("conv_in.bias", "conv_in")):
        less = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(less, tmp_path / "less.safetensors")
        refused(tmp_path / "less.safetensors", says)
    union = shutil.copytree(folder, tmp_path / "union")
    config = json.loads((union / "config.json").read_text())
    (union / "config.json").write_text(
        json.dumps({**config, "_class_name": "ControlNetUnionModel"})
    )
    refused(union, "is a ControlNetUnionModel, not a ControlNetModel")
    strange = shutil.copytree(folder, tmp_path / "strange")
    (strange / "config.json").write_text(json.dumps({**config, "down_block_types": ["Gone"] * 3}))
    refused(strange, "no ControlNet is made by its config")
    gaps = tensors | {"controlnet_down_blocks.20.weight": torch.zeros(())}
    save_file(gaps, tmp_path / "gaps.safetensors")
    refused(tmp_path / "gaps.safetensors", "a ControlNet for another model: its residuals")
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    refused(tmp_path / "nan.safetensors", "NaN")


def test_what_plain_pytorch_does_not_run_takes_none(toy_koala, folder, image):
    pipe = load(toy_koala, "cpu", weights="fp32")
    with pytest.raises(UserError, match="needs a model that plain PyTorch runs"):
        pipe.requests("a fox", control=folder, control_image=image)
