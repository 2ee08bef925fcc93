"""Detection: every known U-Net by its shapes alone, and everything else by its name."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from koala.architectures.config import unet_config
from koala.architectures.table import ARCHITECTURES, get
from koala.checkpoints import ldm_keys
from koala.checkpoints.detect import detect, unet_shapes
from koala.checkpoints.foreign import foreign
from koala.errors import UserError
from toy import toy_unet

SDXL = [name for name, arch in ARCHITECTURES.items() if arch.pooled]
PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "unet.", "module."]


def shapes(name: str, layout: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    arch = get(name)
    return {prefix + n: shape for n, shape in unet_shapes(arch, layout).items()}


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@pytest.mark.parametrize("name", SDXL)
def test_every_known_unet_in_both_layouts(name, layout):
    for prefix in PREFIXES[:2]:
        found = detect(shapes(name, layout, prefix))
        assert found.architecture.name == name
        assert found.architecture == get(name)
        assert (found.layout, found.prefix, found.components) == (layout, prefix, ("unet",))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix):
    for layout in ("diffusers", "ldm"):
        found = detect(shapes("koala-mini", layout, prefix))
        assert (found.architecture.name, found.prefix) == ("koala-mini", prefix)


def whole_checkpoint(name: str) -> dict[str, tuple[int, ...]]:
    """SDXL's single file: names as published, shapes where detection looks."""
    vae, first, second = (
        {ldm_keys.PREFIXES[component] + pair.single: (1,) for pair in pairs}
        for component, pairs in (
            ("vae", ldm_keys.vae_pairs((128, 256, 512, 512), 2)),
            ("text_encoder", ldm_keys.clip_pairs(12)),
            ("text_encoder_2", ldm_keys.open_clip_pairs(32)),
        )
    )
    more = {"conditioner.embedders.1.model.logit_scale": (), "denoiser.sigmas": (1000,)}
    return {**shapes(name, "ldm", ldm_keys.PREFIXES["unet"]), **vae, **first, **second, **more}


def test_what_a_whole_checkpoint_holds():
    whole = whole_checkpoint("koala-700m")
    assert detect(whole).components == ("unet", "vae", "text_encoder", "text_encoder_2")
    no_vae = {n: s for n, s in whole.items() if not n.startswith("first_stage_model.")}
    assert detect(no_vae).components == ("unet", "text_encoder", "text_encoder_2")


@settings(deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 3),
    depths=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 6)).filter(any),
    mid=st.sampled_from(["none", "resnet", "attention"]),
    layout=st.sampled_from(["diffusers", "ldm"]),
    data=st.data(),
)
def test_custom_students(layers, depths, mid, layout, data):
    arch = replace(
        get("sdxl"),
        layers=layers,
        depths=depths,
        up=data.draw(st.tuples(*(
            st.tuples(*(st.integers(0, 4) for _ in range(layers + 1))) for _ in depths
        ))),
        mid={"none": None, "resnet": 0, "attention": depths[-1]}[mid],
    )  # fmt: skip
    found = detect({f"x.{n}": shape for n, shape in unet_shapes(arch, layout).items()})
    assert found.architecture == arch


def test_a_custom_student_of_the_mini_family_has_its_heads():
    arch = replace(get("koala-mini"), depths=(0, 1, 2), up=((2, 2), (1, 1), (0, 0)))
    found = detect(unet_shapes(arch, "ldm")).architecture
    assert (found, found.name, found.heads) == (arch, "custom", arch.heads)


def test_diffusers_own_state_dict():
    config = unet_config(get("ssd-1b"))
    with torch.device("meta"):
        state = UNet2DConditionModel(**config).state_dict()
    assert detect({n: tuple(t.shape) for n, t in state.items()}).architecture.name == "ssd-1b"


# --- what is refused ------------------------------------------------------------------------


def refused(found: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        detect(found)
    assert "\n" not in str(error.value)


FOREIGN = {
    "LoRA": ["lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "a.lora_A.weight",
             "unet.a.lora.down.weight", "unet.a.processor.to_q_lora.down.weight"],
    "LoHa": ["lora_unet_x.hada_w1_a"],
    "LoKr": ["lora_unet_x.lokr_w1"],
    "DoRA": ["lora_unet_x.dora_scale", "unet.x.lora_magnitude_vector"],
    "whole difference": ["lora_unet_x.diff"],
    "ControlNet": ["controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight",
                   "control_model.input_hint_block.0.weight"],
    "IP-Adapter": ["ip_adapter.1.to_k_ip.weight"],
    "motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "Stable Video": ["model.diffusion_model.input_blocks.1.1.time_stack.0.norm_in.weight"],
    "Flux transformer": ["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
                         "single_transformer_blocks.0.proj_mlp.weight"],
    "SD 3 transformer": ["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight",
                         "transformer_blocks.0.attn.add_q_proj.weight"],
    "PixArt": ["caption_projection.linear_1.weight", "y_embedder.y_proj.fc1.weight"],
    "Stable Cascade": ["clip_txt_mapper.weight"],
    "Hunyuan-DiT": ["mlp_t5.0.weight"],
    "Playground": ["edm_mean"],
    "video transformer": ["model.diffusion_model.head.modulation"],
    "VAE alone, in the ldm": ["first_stage_model.encoder.down.0.block.0.conv1.weight"],
    "VAE alone, in the diffusers": ["vae.encoder.down_blocks.0.resnets.0.conv1.weight"],
    "text encoder alone": ["text_model.encoder.layers.0.mlp.fc1.weight",
                           "encoder.layers.0.self_attn.q_proj.weight",
                           "transformer.resblocks.0.ln_1.weight",
                           "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a Control-LoRA, which koala does not read": ["lora_controlnet"],
    "a ControlNet-LLLite, which koala": ["lllite_unet_input_blocks_4_1_attn1_to_k.up.0.weight"],
    "a T2I-Adapter, which koala": [
        "adapter.body.0.resnets.0.block1.weight", "body.0.block1.weight"],
    "an IP-Adapter FaceID, which koala": ["image_proj.proj.0.weight"],
    "an IP-Adapter Plus, or InstantID's, which koala": ["image_proj.latents"],
    "a hypernetwork, which koala": ["768.0.linear.0.weight"],
    "a GLoRA, which koala": ["lora_unet_x.a1.weight", "lora_unet_x.b1.weight"],
    "a VeRA, which koala": ["base_model.model.x.vera_lambda_b"],
    "an OFT adapter, which koala": ["lora_unet_x.oft_blocks", "x.oft_diag", "x.boft_R"],
    "norms of a LyCORIS training": ["lora_unet_x.w_norm"],
    "a ControlNet Union, which koala": ["control_add_embedding.linear_1.weight"],
    "a ControlNet with the names of the original ldm code": ["control_model.zero_convs.0.weight"],
    "a ControlNet of SD 3 or Flux": ["controlnet_blocks.0.weight"],
    "a PhotoMaker adapter": ["id_encoder.visual_projection_2.weight"],
    "an image encoder, which `koala generate --image-encoder`": [
        "vision_model.encoder.layers.0.mlp.fc1.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
    "an upscaler": ["model.1.sub.0.RDB1.conv1.0.weight", "body.0.rdb1.conv1.weight"],
    "a tiny autoencoder": ["decoder.layers.1.weight", "3.conv.0.weight"],
    "Chroma": ["distilled_guidance_layer.in_proj.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight"],
    "Sana": ["transformer_blocks.0.ff.conv_inverted.weight"],
    "Kolors": ["encoder_hid_proj.weight"],
    "latent consistency": ["time_embedding.cond_proj.weight"],
    "4 bits of bitsandbytes": ["a.weight.quant_state.bitsandbytes__nf4"],
    "an unknown kind of model": ["weight", ""],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in FOREIGN.items() for n in names])
def test_other_files_are_refused_by_name(kind, name):
    assert kind in foreign({name: (1, 1)})
    refused({name: (1, 1)}, f"^this is not a Stable Diffusion XL model but .*{kind}")


@pytest.mark.parametrize(("family", "found"), [
    ("Flux", {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 3072)}),
    ("Wan", {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 9)}),
    ("another diffusion transformer", {
        "transformer.transformer_blocks.0.to_q.lora_A.weight": (4, 9),
    }),
    ("SD 1.5", {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)}),
    ("SD 1.5", {"lora_unet_x_attn2_to_k.lora_down.weight": (4, 768)}),
    ("SD 2", {"unet.x.attn2.to_k.lora_A.weight": (4, 1024)}),
    ("the SDXL refiner", {"unet.x.attn2.processor.to_k_lora.down.weight": (4, 1280)}),
    ("SD 1.5", {"image_proj.proj.weight": (3072, 9), "ip_adapter.1.to_k_ip.weight": (320, 768)}),
    ("SD 1.5", {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
                "down_blocks.0.attentions.0.attn2.to_k.weight": (320, 768)}),
])  # fmt: skip
def test_an_adapter_of_another_model_is_not_to_be_applied(family, found):
    assert f" for {family}, " in foreign(found)
    assert foreign(found).endswith(", which koala does not read")


def test_what_koala_applies_is_said_with_its_option():
    lora = {"lora_unet_x_attn2_to_k.lora_down.weight": (4, 2048)}
    assert foreign(lora) == "a LoRA, which is applied to a model with `koala generate --lora`"
    net = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}
    assert "koala generate --control" in foreign(net)
    assert "koala generate --ip-adapter" in foreign({"ip_adapter.1.to_k_ip.weight": (640, 2048)})
    face = {"image_proj.proj.0.weight": (1, 1), "ip_adapter.0.to_q_lora.down.weight": (1, 1)}
    assert foreign(face).startswith("an IP-Adapter FaceID")


def test_an_empty_file_is_no_model():
    refused({}, "an unknown kind of model")


def test_no_model_of_ours_is_taken_for_another():
    for name in SDXL:
        assert foreign(whole_checkpoint(name)) == ""


def relative(context: int, linear: bool, **changes) -> dict[str, tuple[int, ...]]:
    arch = replace(get("sdm-v2.0"), context=context, linear=linear, **changes)
    return {f"model.diffusion_model.{n}": s for n, s in unet_shapes(arch, "ldm").items()}


def test_relatives_are_refused_by_name():
    refused(relative(768, False), r"^this is SD 1.5: .*no addition embedding")
    refused(relative(1024, True), r"^this is SD 2: ")
    refused(relative(512, True), r"^this is an unknown kind of U-Net: ")
    refused(shapes("sdm-v2.0", "diffusers"), "^this is SD 2: ")
    refiner = relative(1280, True, widths=(384, 768, 1536, 1536), pooled=1280, time_ids=256)
    refused(refiner, "^this is the SDXL refiner")
    inpainting = shapes("sdxl", "ldm", "model.diffusion_model.")
    inpainting["model.diffusion_model.input_blocks.0.0.weight"] = (320, 9, 3, 3)
    refused(inpainting, "^this is an inpainting U-Net: it has 9 input channels")
    toy = {n: tuple(t.shape) for n, t in toy_unet("koala").state_dict().items()}
    refused(toy, r"unknown kind of U-Net: widths \[16, 32, 32\] .*config.json instead")
    blind = replace(get("sdxl"), depths=(0, 0, 0), up=((0,) * 3,) * 3, mid=0)
    refused(unet_shapes(blind, "ldm"), "it has no attention")
    refused({"input_blocks.1.0.emb_layers.1.weight": (1, 1)}, "its blocks are not those of SDXL")


def test_missing_and_extra_tensors_are_named():
    found = shapes("koala-700m", "ldm", "model.diffusion_model.")
    lost = [name for name in sorted(found) if "output_blocks.3.1." in name][:13]
    for name in lost:
        del found[name]
    refused(found, r"nearest known U-Net is koala-700m; missing tensors: (\S+, ){9}\S+ and 3 more$")
    found = shapes("sdxl", "diffusers")
    found["stranger"] = found["conv_out.weight"]
    found["conv_norm_out.bias"] = (319,)
    refused(
        found,
        r"sdxl; unexpected tensors: stranger; .* wrong shape: conv_norm_out.bias \[319\]",
    )
