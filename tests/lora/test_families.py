"""LoRAs of other models are refused by the name of their family, by names, shapes or metadata."""

import pytest
import torch
from safetensors.torch import save_file

from koala.errors import UserError
from koala.lora.names import base_named
from koala.lora.reading import read

SDXL = base_named("sdxl")
ATTENTION = "transformer_blocks_0_attn1_to_q"
KEPT = {"lora_unet_input_blocks_4_1_" + ATTENTION: (640, 640)}  # also a module of SDXL


def lora(file, modules, metadata=None, ends=(".lora_down.weight", ".lora_up.weight")):
    """Of rank 1: module -> (outputs, inputs)."""
    tensors = {}
    for stem, (outer, inner) in modules.items():
        tensors |= {stem + ends[0]: torch.zeros(1, inner), stem + ends[1]: torch.zeros(outer, 1)}
    save_file(tensors, file, metadata)
    return file


@pytest.mark.parametrize(
    ("module", "width", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_" + ATTENTION, 320, "SD 1.5 or SD 2"),
        ("unet.up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_k", 768, "SD 1.5"),
        ("lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn2_to_v", 1024, "SD 2"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, "SD 1.5"),
        ("lora_te.text_model.encoder.layers.0.mlp.fc1", 1024, "SD 2"),
        ("lora_unet_input_blocks_4_1_" + ATTENTION, 768, "the SDXL refiner"),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
            1280,
            "the SDXL refiner",
        ),
        ("unet.encoder_hid_proj", 4096, "Kolors"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072, "Flux"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", 3072, "Flux"),
        ("base_model.model.single_transformer_blocks.0.attn.to_q", 3072, "Flux"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", 6144, "Flux.2"),
        ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", 5120, "Chroma"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, "SD 3"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", 1536, "SD 3"),
        ("transformer_blocks.0.attn.add_q_proj", 3072, "Qwen-Image"),
        ("lora_unet_transformer_blocks_59_img_mlp_net_2", 12288, "Qwen-Image"),
        ("transformer.joint_transformer_blocks.0.attn.to_q", 3072, "AuraFlow"),
        ("diffusion_model.double_stream_blocks.0.block.attn1.to_q", 2560, "HiDream"),
        ("transformer.double_blocks.0.img_attn_qkv", 3072, "HunyuanVideo"),
        ("diffusion_model.layers.0.attention.to_q", 3840, "Z-Image"),
        ("lora_unet_layers_0_attention_qkv", 2304, "Z-Image or Lumina"),
        ("diffusion_model.blocks.0.self_attn.q", 5120, "Wan"),
        ("transformer.blocks.0.attn1.to_q", 5120, "Wan"),
        ("diffusion_model.blocks.0.self_attn.q_proj", 2048, "Cosmos or Anima"),
        ("base_model.model.transformer_blocks.0.attn1.to_q", 1152, "PixArt"),
        ("transformer.transformer_blocks.0.attn1.to_q", 2048, "LTX-Video"),
        ("transformer.transformer_blocks.0.attn1.to_q", 1920, "CogVideoX"),
        ("transformer.transformer_blocks.0.attn1.to_q", 2240, "Sana"),
        ("transformer.transformer_blocks.0.attn1.add_q_proj", 1536, "Mochi"),
        ("lora_unet_blocks_0_attn1_Wqkv", 1408, "Hunyuan-DiT"),
        ("lora_prior_unet_down_blocks_0_2_attention_attn_out_proj", 1536, "Stable Cascade"),
        ("unet.down_blocks.1.attentions.0.add_k_proj", 1280, "Kandinsky or DeepFloyd IF"),
        ("down_blocks.0.motion_modules.0.temporal_transformer." + ATTENTION, 320, "AnimateDiff"),
        ("base_model.model.model.layers.0.self_attn.q_proj", 4096, "a language model"),
    ],
)
def test_another_familys_lora_is_refused_by_name(tmp_path, module, width, family):
    """Also where it has text encoders like SDXL's, and as a LoKr."""
    told = f"is a LoRA for {family}[ :,]"
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}
    with pytest.raises(UserError, match=told) as caught:
        read(lora(tmp_path / "a.safetensors", {module: (64, width)} | text), SDXL)
    assert "\n" not in str(caught.value)
    if module not in KEPT and "attn2" not in module:
        factors = {"lokr_w1": torch.zeros(4, 4), "lokr_w2": torch.zeros(16, 16)}
        save_file(
            {f"{module}.{name}": t for name, t in factors.items()}, tmp_path / "b.safetensors"
        )
        with pytest.raises(UserError, match="is a LoRA for "):
            read(tmp_path / "b.safetensors", SDXL)


def test_xlabs_own_endings(tmp_path):
    ends = (".processor.qkv_lora1.down.weight", ".processor.qkv_lora1.up.weight")
    with pytest.raises(UserError, match="is a LoRA for Flux"):
        read(lora(tmp_path / "a.safetensors", {"double_blocks.0": (9, 3072)}, None, ends), SDXL)


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1.5"),
        ({"ss_base_model_version": "z_image"}, "Z-Image"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
    ],
)
def test_of_what_does_not_fit_the_metadata_is_believed(tmp_path, metadata, family):
    for module in ("lora_unet_middle_9", "lora_unet_input_blocks_4_1_" + ATTENTION):
        with pytest.raises(UserError, match=f"is a LoRA for {family} "):
            read(lora(tmp_path / "a.safetensors", {module: (64, 64)}, metadata), SDXL)


def test_what_fits_is_read_and_a_contradiction_is_said(tmp_path):
    """Merging programs carry a first file's metadata over. Kolors' shapes are SDXL's."""
    file = tmp_path / "a.safetensors"
    assert not read(
        lora(file, KEPT, {"ss_base_model_version": "sdxl_base_v1-0"}), SDXL
    ).report.doubt
    assert not read(lora(file, KEPT, {"modelspec.architecture": "pony/lora"}), SDXL).report.doubt
    doubt = read(lora(file, KEPT, {"ss_base_model_version": "sd_v1"}), SDXL).report.doubt
    assert doubt == "but its ss_base_model_version is 'sd_v1', which is SD 1.5's"
    with pytest.raises(UserError, match="is a LoRA for Kolors"):
        read(lora(file, KEPT, {"modelspec.architecture": "kolors/lora"}), SDXL)
