"""IP-Adapters: equal to diffusers' on SDXL, and on a student what the block map leaves."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from koala.architectures.attention_map import attention_map, cross_attentions, roots
from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.table import ARCHITECTURES, get
from koala.checkpoints.ip_adapter import open_image_encoder, open_ip_adapter
from koala.errors import UserError
from koala.generation import load, read_settings, save
from koala.generation.image_inputs import for_clip
from koala.generation.image_prompt import fitted_adapter
from koala.generation.loader import _giving_way
from koala.generation.png import parameters
from koala.generation.request_checks import checked
from koala.generation.runtime.pytorch import predictor
from koala.generation.workflow import workflow
from stepping import assert_drawn_together_as_alone, latents_of
from toy import toy_pipeline, toy_unet
from toy_controlnet import saved, toy_controlnet
from toy_ip_adapter import SIDE, toy_image_encoder, toy_ip_adapter

ASKED = {"negative_prompt": "blur", "guidance": 4, "steps": 4, "seed": 11}
# Cross-attentions of the toy SDXL's 17 that each of the student's 6 inherits from: the first block
# of each down stage's first resnet, and of each up stage's first and last.
TAKEN = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2": 0,
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2": 2,
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2": 6,
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2": 10,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2": 12,
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2": 14,
}


@pytest.fixture(scope="module")
def adapter(toy_sdxl, tmp_path_factory):
    """The file, with its image encoder beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    toy_image_encoder(folder / "image_encoder")
    unet = StableDiffusionXLPipeline.from_pretrained(toy_sdxl).unet
    return toy_ip_adapter(unet, folder / "ip-toy.safetensors")


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (31, 50, 3), np.uint8)
    return Image.fromarray(pixels)


@torch.inference_mode()
def drawn(pipe, **asked):
    return latents_of(pipe, "a red fox", **{**ASKED, **asked})


def of_diffusers(ours, folder, kind=StableDiffusionXLPipeline, **parts):
    theirs = kind.from_pretrained(
        folder, scheduler=EulerDiscreteScheduler.from_config(ours.scheduler_config), **parts
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def latents(theirs, shown, guidance=4.0, negative="blur", **more):
    return theirs(
        "a red fox", negative_prompt=negative, ip_adapter_image=shown, guidance_scale=guidance,
        num_inference_steps=4, generator=[torch.Generator().manual_seed(11)],
        output_type="latent", **more,
    ).images  # fmt: skip


def assert_equal(ours, theirs, plain):
    bound = 1e-4 * (theirs.max() - theirs.min()).item()
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)
    assert (plain - ours).abs().max() > 100 * bound


@pytest.mark.parametrize(
    ("scale", "guidance", "negative"), [(1.0, 4.0, "blur"), (0.6, 4.0, None), (0.6, 1.0, None)]
)
def test_on_sdxl_it_equals_diffusers(toy_sdxl, adapter, image, scale, guidance, negative):
    ours = load(toy_sdxl, "cpu")
    theirs = of_diffusers(ours, toy_sdxl)
    theirs.load_ip_adapter(adapter.parent, subfolder="", weight_name=adapter.name)
    theirs.set_ip_adapter_scale(scale)
    expected = latents(theirs, image, guidance, negative)
    asked = {"guidance": guidance, "negative_prompt": negative or ""}
    found = drawn(ours, ip_adapter=adapter, ip_image=image, ip_scale=scale, **asked)
    assert_equal(found, expected, drawn(ours, **asked))


def test_beside_a_controlnet_it_equals_diffusers(toy_sdxl, adapter, image, tmp_path):
    ours = load(toy_sdxl, "cpu")
    net = toy_controlnet(ours.unet)
    theirs = of_diffusers(ours, toy_sdxl, StableDiffusionXLControlNetPipeline, controlnet=net)
    theirs.load_ip_adapter(adapter.parent, subfolder="", weight_name=adapter.name)
    edges = image.resize((64, 64))
    expected = latents(theirs, image, image=edges)
    control = {"control": saved(net, tmp_path / "edges"), "control_image": edges}
    found = drawn(ours, ip_adapter=adapter, ip_image=image, **control)
    assert_equal(found, expected, drawn(ours, **control))


def test_on_a_student_it_equals_diffusers_with_the_mapped_layers(toy_koala, adapter, image):
    ours = load(toy_koala, "cpu")
    fits = fitted_adapter(adapter, None, "toy", ours.known.base.unet)
    assert fits.takes == TAKEN
    assert fits.line() == (
        "IP-Adapter ip-toy: 6 of 17 layers are used; left out: 1 of down_blocks.1, 3 of "
        "down_blocks.2, 4 of up_blocks.0, 1 of up_blocks.1, 2 of mid_block"
    )
    theirs = of_diffusers(ours, toy_koala)
    theirs.image_encoder = CLIPVisionModelWithProjection.from_pretrained(
        adapter.parent / "image_encoder"
    )
    theirs.feature_extractor = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    tensors = load_file(adapter)
    processors = theirs.unet.attn_processors
    for path, place in TAKEN.items():
        width = theirs.unet.get_submodule(path).to_k.out_features
        one = IPAdapterAttnProcessor2_0(width, 40, num_tokens=(4,), scale=0.7)
        for part in "kv":
            weight = tensors[f"ip_adapter.{2 * place + 1}.to_{part}_ip.weight"]
            getattr(one, f"to_{part}_ip")[0].weight.data = weight
        processors[f"{path}.processor"] = one
    theirs.unet.set_attn_processor(processors)
    state = {k.removeprefix("image_proj."): t for k, t in tensors.items() if "image_proj" in k}
    project = theirs.unet._convert_ip_adapter_image_proj_to_diffusers(state, False)
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    theirs.unet.encoder_hid_proj = MultiIPAdapterImageProjection([project])
    theirs.unet.config.encoder_hid_dim_type = "ip_image_proj"
    expected = latents(theirs, image)
    found = drawn(ours, ip_adapter=adapter, ip_image=image, ip_scale=0.7)
    assert_equal(found, expected, drawn(ours))


def test_scale_0_is_the_plain_image(toy_koala, adapter, image):
    pipe = load(toy_koala, "cpu")
    processors = dict(pipe.unet.attn_processors)
    off = drawn(pipe, ip_adapter=adapter, ip_image=image, ip_scale=0)
    torch.testing.assert_close(off, drawn(pipe), atol=0, rtol=0)
    assert (drawn(pipe, ip_adapter=adapter, ip_image=image) - off).abs().max() > 1e-2
    torch.testing.assert_close(drawn(pipe), off, atol=0, rtol=0)
    assert pipe.unet.attn_processors == processors


def test_a_lora_acts_beside_it(toy_sdxl, adapter, image, tmp_path):
    """Its hooks are on the layers that the adapter's attention calls: as if it were merged."""
    from toy_lora import toy_lora

    pipe = load(toy_sdxl, "cpu")
    toy_lora(tmp_path / "ink.safetensors", pipe.known.base)
    asked = {"ip_adapter": adapter, "ip_image": image}
    plain = drawn(pipe, **asked)
    pipe.add_lora(tmp_path / "ink.safetensors")
    beside = drawn(pipe, **asked)
    pipe.remove_lora("ink")
    pipe.add_lora(tmp_path / "ink.safetensors", merged=True)
    merged = drawn(pipe, **asked)
    torch.testing.assert_close(beside, merged, atol=1e-4 * merged.abs().max().item(), rtol=0)
    assert (plain - merged).abs().max() > 1e-2


# --- the map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "koala-700m", "koala-1b", "ssd-1b", "koala-mini"])
def test_the_order_is_that_of_diffusers_processors(name):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(get(name)))
    found = [n.removesuffix(".processor") for n in unet.attn_processors if ".attn2." in n]
    widths = [unet.get_submodule(path).to_k.out_features for path in found]
    assert [*cross_attentions(get(name)).items()] == [*zip(found, widths, strict=True)]


@pytest.mark.parametrize(
    ("name", "used"), [("sdxl", 70), ("koala-1b", 30), ("koala-700m", 21), ("ssd-1b", 34)]
)
def test_sdxls_adapter_is_mapped_to_what_is_left(name, used):
    """SDXL's has the layers 1, 3, ... 139."""
    widths = [*cross_attentions(get("sdxl")).values()]
    assert len(widths) == 70
    (teacher,) = roots(get(name), widths)
    assert teacher == get("sdxl") and teacher.name == "sdxl"
    taken = attention_map(teacher, get(name))
    assert len({*taken}) == used == len(cross_attentions(get(name)))
    own = [*cross_attentions(get(name)).values()]
    assert [widths[i] for i in taken] == own


def test_every_teacher_is_told_by_the_adapters_widths():
    for name, arch in ARCHITECTURES.items():
        widths = [*cross_attentions(arch).values()]
        for root in roots(arch, widths):
            assert root == arch, name
        assert roots(arch, [*widths, 7]) == []


# --- batches, backends, records ---------------------------------------------------------------


def test_in_one_batch_each_image_is_its_own(toy_sdxl, adapter, image, tmp_path):
    """With an adapter, with another image and scale, with another adapter, and with none."""
    pipe = load(toy_sdxl, "cpu")
    other = toy_ip_adapter(pipe.unet, tmp_path / "other.safetensors", seed=1)
    shown = {"ip_image": image, "image_encoder": adapter.parent / "image_encoder"}
    turned = image.transpose(Image.Transpose.ROTATE_90)
    kinds = [
        {**shown, "ip_adapter": adapter},
        {**shown, "ip_adapter": adapter, "ip_image": turned, "ip_scale": 0.5},
        {**shown, "ip_adapter": other},
        {},
    ]
    requests = [pipe.requests("a fox", **{**ASKED, **kind})[0] for kind in kinds]
    assert_drawn_together_as_alone(pipe, requests)


def test_another_backend_gives_way_to_pytorch(toy_koala, adapter, image):
    pipe = load(toy_koala, "cpu")
    asked = {"ip_adapter": adapter, "ip_image": image}
    expected, plain = drawn(pipe, **asked), drawn(pipe)
    calls = []

    def other(*given):
        calls.append(given)
        return predictor(pipe.unet)(*given)

    pipe.predict = pipe._plain = _giving_way(pipe, other)
    torch.testing.assert_close(drawn(pipe, **asked), expected, atol=0, rtol=0)
    assert not calls
    torch.testing.assert_close(drawn(pipe), plain, atol=0, rtol=0)
    assert len(calls) == ASKED["steps"]


def test_an_image_says_what_it_was_drawn_by(toy_koala, adapter, image, tmp_path):
    pipe = load(toy_koala, "cpu")
    result = pipe("a fox", steps=1, seed=1, ip_adapter=adapter, ip_image=image, ip_scale=0.5)
    (path,) = save(result, tmp_path)
    settings = read_settings(path)
    assert (settings.ip_adapter, settings.ip_scale) == ("ip-toy", 0.5)
    assert len(settings.ip_image) == 16
    assert parameters(settings).endswith('IP-Adapter: "Model: ip-toy, Weight: 0.5"')
    with pytest.raises(UserError, match="without an IP-Adapter: leave out --workflow"):
        workflow(settings)


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (16, 16), (8, 100), (333, 335)])
def test_an_image_is_read_as_clip_reads_it(size):
    draws = np.random.default_rng(1)
    image = Image.fromarray(draws.integers(0, 256, (size[1], size[0], 3), np.uint8))
    prepare = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    expected = prepare(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(for_clip(image, SIDE), expected, atol=1e-6)


def test_a_transparent_image_lies_on_white():
    clear, white = Image.new("RGBA", (20, 20)), Image.new("RGB", (20, 20), "white")
    np.testing.assert_array_equal(for_clip(clear, SIDE), for_clip(white, SIDE))


def test_an_older_encoder_with_positions_is_read(toy_koala, adapter, image, tmp_path):
    older = shutil.copytree(adapter.parent / "image_encoder", tmp_path / "older")
    tensors = load_file(older / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, older / "model.safetensors")
    pipe = load(toy_koala, "cpu")
    found = [
        drawn(pipe, ip_adapter=adapter, ip_image=image, image_encoder=encoder, steps=1)
        for encoder in (None, older)
    ]
    torch.testing.assert_close(*found, atol=0, rtol=0)


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ip_image": "fox.png"}, "an image prompt has no effect without an IP-Adapter"),
        ({"ip_scale": 0.5}, "an image prompt's scale has no effect without an IP-Adapter"),
        ({"image_encoder": "x"}, "an image encoder has no effect without an IP-Adapter"),
        ({"ip_adapter": "FILE"}, "needs an image, which it takes for a prompt"),
        ({"ip_adapter": "FILE", "ip_image": "IMAGE", "ip_scale": 2.5}, "allowed are numbers"),
        ({"ip_adapter": "FILE", "ip_image": "IMAGE", "ip_scale": -1}, "IP-Adapter scale is -1"),
        ({"ip_adapter": "FILE", "ip_image": "IMAGE", "ip_scale": float("nan")}, "is nan"),
        ({"ip_adapter": "gone.safetensors", "ip_image": "IMAGE"}, "safetensors does not exist"),
        ({"ip_adapter": "MODEL", "ip_image": "IMAGE"}, "koala is a folder: give the .safetensors"),
        ({"ip_adapter": "FILE", "ip_image": "gone.png"}, "gone.png cannot be read"),
        ({"ip_adapter": "FILE", "ip_image": "IMAGE", "image_encoder": "gone"}, "gone is no folder"),
        (
            {"ip_adapter": "FILE", "ip_image": "IMAGE", "image_encoder": "TEXT"},
            "text_encoder is clip_text_model, not an image encoder",
        ),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_refused(toy_koala, adapter, image, asked, says):
    named = {
        "FILE": adapter,
        "IMAGE": image,
        "MODEL": toy_koala,
        "TEXT": toy_koala / "text_encoder",
    }
    asked = {key: named.get(value, value) for key, value in asked.items()}
    with pytest.raises(UserError, match=says) as error:
        load(toy_koala, "cpu").requests("a fox", **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["image_proj.latents", "ip_adapter.1.to_k_ip.weight"], "is an IP-Adapter Plus"),
        (["image_proj.proj.3.weight"], "is an IP-Adapter Full Face"),
        (["image_proj.proj.0.weight", "image_proj.norm.weight"], "is an IP-Adapter FaceID: give"),
        (["ip_adapter.0.to_q_lora.down.weight"], "is an IP-Adapter FaceID: give"),
        (["image_proj.perceiver_resampler.proj_in.weight"], "is an IP-Adapter FaceID Plus"),
        (["unet.mid.lora_down.weight"], "is a LoRA, .* not an IP-Adapter"),
        (["controlnet_cond_embedding.conv_in.weight"], "is a ControlNet, .* not an IP-Adapter"),
        (["something.weight"], "an unknown kind of model, not an IP-Adapter"),
        (["ip_adapter.1.to_k_ip.weight"], "not a whole IP-Adapter: missing tensors: image_proj"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, names, says):
    file = tmp_path / "adapter.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    with pytest.raises(UserError, match=says) as error:
        open_ip_adapter(file)
    assert "\n" not in str(error.value)


def test_a_pickle_is_refused(tmp_path):
    torch.save({"image_proj": {}, "ip_adapter": {}}, tmp_path / "ip-adapter_sdxl.bin")
    with pytest.raises(UserError, match="pickle"):
        open_ip_adapter(tmp_path / "ip-adapter_sdxl.bin")


def test_an_adapter_for_another_model_is_refused_by_what_differs(adapter, tmp_path):
    arch = from_unet_config(toy_unet("koala").config)
    narrow = UNet2DConditionModel.from_config(
        {**toy_unet("sdxl").config, "cross_attention_dim": 24}
    )
    file = toy_ip_adapter(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match="for another model: its tokens are 24 wide, toy needs 40"):
        fitted_adapter(file, None, "toy", arch)
    wide = UNet2DConditionModel.from_config(
        {
            **toy_unet("sdxl").config,
            "block_out_channels": (16, 32, 64),
            "attention_head_dim": (1, 2, 4),
        }
    )
    file = toy_ip_adapter(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="its 17 layers are not those of toy, which has 6"):
        fitted_adapter(file, None, "toy", arch)
    own = toy_ip_adapter(toy_unet("koala"), tmp_path / "own.safetensors")
    encoder = adapter.parent / "image_encoder"
    assert [*fitted_adapter(own, encoder, "toy", arch).takes.values()] == [*range(6)]
    with pytest.raises(UserError, match="its 6 layers are not those of big, which has 17"):
        fitted_adapter(own, encoder, "big", from_unet_config(toy_unet("sdxl").config))


def test_an_adapter_of_sd_15_is_named(adapter, tmp_path):
    config = {**toy_unet("sdxl").config, "cross_attention_dim": 768}
    file = toy_ip_adapter(UNet2DConditionModel.from_config(config), tmp_path / "sd15.safetensors")
    with pytest.raises(UserError, match=r"for SD 1\.5: its tokens are 768 wide, sdxl needs 2048"):
        fitted_adapter(file, None, "sdxl", get("sdxl"))


def test_a_model_pruned_inside_its_cross_attentions_is_refused(adapter):
    arch = from_unet_config(toy_unet("sdxl").config)
    path = "mid_block.attentions.0.transformer_blocks.1"
    other = replace(arch, inner=((f"{path}.ff", 64),))
    assert len(fitted_adapter(adapter, None, "toy", other).takes) == 17
    narrowed = replace(arch, inner=((f"{path}.attn2", 16),))
    with pytest.raises(UserError, match="pruned inside 1 of its 17 cross-attentions"):
        fitted_adapter(adapter, None, "toy", narrowed)


def test_an_encoder_that_is_not_the_adapters_is_refused(toy_koala, adapter, image, tmp_path):
    arch = from_unet_config(toy_unet("koala").config)
    other = toy_image_encoder(tmp_path / "other", projection_dim=20)
    with pytest.raises(UserError, match=r"embeddings 20 wide, .* reads 12: give the encoder"):
        fitted_adapter(adapter, other, "toy", arch)
    alone = shutil.copy(adapter, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="needs the image encoder that it was trained with"):
        fitted_adapter(alone, None, "toy", arch)
    pipe = load(toy_koala, "cpu")

    def refused(says):
        with pytest.raises(UserError, match=says) as error:
            pipe("a fox", steps=1, ip_adapter=adapter, ip_image=image, image_encoder=broken)
        assert "\n" not in str(error.value)

    broken = shutil.copytree(adapter.parent / "image_encoder", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    config = json.loads((broken / "config.json").read_text())
    for change, says in (
        ({"num_hidden_layers": 1}, "weights do not fit config.json: unexpected tensors"),
        ({"num_attention_heads": 3}, "3 heads do not divide"),
        ({"patch_size": 17}, "patch_size must be at most image_size"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "siglip_vision_model"}, "is siglip_vision_model, not an image encoder"),
    ):
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        refused(says)
    (broken / "config.json").write_text(json.dumps(config))
    bad = copy.deepcopy(tensors)
    bad["visual_projection.weight"][0] = float("nan")
    save_file(bad, broken / "model.safetensors")
    refused("NaN")
    del tensors["visual_projection.weight"]
    save_file(tensors, broken / "model.safetensors")
    refused("has no visual_projection")


def test_a_damaged_adapter_is_refused(toy_koala, adapter, image, tmp_path):
    pipe, encoder = load(toy_koala, "cpu"), adapter.parent / "image_encoder"
    tensors, file = load_file(adapter), tmp_path / "bad.safetensors"

    def refused(changed, says):
        save_file(changed, file)
        with pytest.raises(UserError, match=says):
            pipe("a fox", steps=1, ip_adapter=file, ip_image=image, image_encoder=encoder)

    key = "ip_adapter.1.to_k_ip.weight"
    refused({k: t for k, t in tensors.items() if k != key}, "missing tensors: ip_adapter.1.to_k")
    refused(
        {**tensors, "ip_adapter.2.to_k_ip.weight": tensors[key].clone()}, "not a whole IP-Adapter"
    )
    refused({**tensors, key: torch.zeros(32, 41)}, "wrong shape: ip_adapter.1.to_k_ip")
    refused({**tensors, key: torch.zeros(())}, "wrong shape: ip_adapter.1.to_k_ip")
    refused({**tensors, "image_proj.norm.weight": torch.zeros(())}, "not a whole IP-Adapter")
    refused({**tensors, key: tensors[key].to(torch.int32)}, "I32 tensors; they must be floats")
    refused({**tensors, key: tensors[key] * float("nan")}, "NaN")


def test_what_plain_pytorch_does_not_run_takes_none(toy_koala, adapter, image):
    pipe = load(toy_koala, "cpu", weights="fp32")
    with pytest.raises(UserError, match="an IP-Adapter needs a model that plain PyTorch runs"):
        pipe.requests("a fox", ip_adapter=adapter, ip_image=image)


def test_a_model_without_pytorch_takes_none(toy_koala, adapter, image):
    form = replace(load(toy_koala, "cpu").known, base=None)
    with pytest.raises(UserError, match="koala runs without PyTorch, which the IP-Adapter"):
        checked(form, "a fox", ip_adapter=adapter, ip_image=image)


def test_refusals_load_no_torch(tmp_path):
    config = {**toy_unet("sdxl").config, "cross_attention_dim": 768}
    file = toy_ip_adapter(UNet2DConditionModel.from_config(config), tmp_path / "sd15.safetensors")
    code = (
        "import sys\n"
        "from koala.errors import UserError\n"
        "from koala.generation.request_checks import checked\n"
        "try:\n"
        f"    checked({str(tmp_path / 'toy')!r}, 'a fox', ip_adapter={str(file)!r},\n"
        f"            ip_image={str(tmp_path / 'fox.png')!r})\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "print('torch' in sys.modules)\n"
    )
    toy_pipeline(tmp_path / "toy", architecture="sdxl")
    Image.new("RGB", (8, 8)).save(tmp_path / "fox.png")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "its tokens are 768 wide" in done.stdout and done.stdout.endswith("False\n"), done


def test_the_encoder_of_the_adapters_folder_is_taken(adapter):
    assert open_image_encoder(adapter.parent / "image_encoder").gives == 12
