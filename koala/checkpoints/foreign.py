"""Names what a weights file is that holds no SDXL-class model, by its tensors' names and shapes.

An adapter's name says where koala takes it, or that it reads none of its kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from koala.checkpoints.lora_families import CONTEXTS, of_modules

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of tensors, by name

UNET_ENDS = {  # layout -> the one tensor that every U-Net has, first stage, first resnet
    "diffusers": "down_blocks.0.resnets.0.time_emb_proj.weight",
    "ldm": "input_blocks.1.0.emb_layers.1.weight",
}
VAE_ENDS = {
    "diffusers": "encoder.down_blocks.0.resnets.0.conv1.weight",
    "ldm": "encoder.down.0.block.0.conv1.weight",
}
_UNREAD = "which koala does not read"
_LORA = "which is applied to a model with `koala generate --lora`"
_CONTROL = "which is applied to a model with `koala generate --control`"
_IP_ADAPTER = "which is applied to a model with `koala generate --ip-adapter`"
_QUANTISED = "which koala does not read: take the model in fp16, bf16 or fp8"

# (kind, what koala does with it, parts of tensor names that identify it). "\n" stands for a name's
# beginning. The first match wins.
_Kinds: TypeAlias = tuple[tuple[str, str, tuple[str, ...]], ...]
_ADAPTERS: _Kinds = (
    ("a Control-LoRA", _UNREAD, ("lora_controlnet",)),
    ("a ControlNet-LLLite", _UNREAD, ("lllite_",)),
    ("a PhotoMaker adapter", _UNREAD, ("\nid_encoder.",)),
    ("a PuLID adapter", _UNREAD, ("pulid_ca.", "id_adapter.", "id_adapter_attn_layers.")),
    ("an IP-Adapter FaceID Plus", _UNREAD, ("image_proj.perceiver_resampler.",)),
    ("an IP-Adapter Plus, or InstantID's", _UNREAD, ("image_proj.latents",)),
    ("an IP-Adapter Full Face", _UNREAD, ("image_proj.proj.3.",)),
    ("an IP-Adapter FaceID", _UNREAD, (
        "image_proj.proj.0.", "\nip_adapter.0.to_q_lora.", "_ip_lora.",
    )),
    ("a T2I-Adapter", _UNREAD, ("adapter.body.", "\nbody.0.block1.", "\nbody.0.resnets.0.block1.")),
    ("a Custom Diffusion adapter", _UNREAD, ("_custom_diffusion.",)),
    ("a GLoRA", _UNREAD, (".a1.weight", ".b1.weight")),
    ("a VeRA", _UNREAD, (".vera_lambda_",)),
    ("an IA3 adapter", _UNREAD, (".on_input", ".ia3_l")),
    ("an OFT adapter", _UNREAD, (".oft_", ".boft_")),
    ("a LoHa", _LORA, (".hada_w1",)),
    ("a LoKr", _LORA, (".lokr_w1", ".lokr_w2")),
    ("a DoRA", _LORA, (".dora_scale", ".lora_magnitude_vector")),
    ("a LoRA", _LORA, (
        ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.",
        "lora_linear_layer.", "_lora.down.", ".lora_mid.",
    )),
    ("a motion module (AnimateDiff)", _UNREAD, ("motion_modules.",)),
    ("a ControlNet Union", _UNREAD, ("control_add_embedding.",)),
    ("a ControlNet-XS", _UNREAD, ("ctrl_to_base", "base_to_ctrl")),
    ("a ControlNet of SD 3 or Flux", _UNREAD, ("controlnet_blocks.", "controlnet_x_embedder.")),
    ("a ControlNet with the names of the original ldm code", _UNREAD, (
        "input_hint_block.", "control_model.",
    )),
    ("a ControlNet", _CONTROL, ("controlnet_cond_embedding.",)),
    ("an IP-Adapter", _IP_ADAPTER, ("ip_adapter.", "to_k_ip.", "\nimage_proj.")),
)  # fmt: skip
_QUANTISED_KINDS: _Kinds = (
    ("a model in 4 bits of bitsandbytes", _QUANTISED, (".quant_state.bitsandbytes", ".absmax")),
    ("a model in 8 bits of bitsandbytes", _QUANTISED, (".SCB",)),
    ("a model in 4 bits (GPTQ, AWQ or Nunchaku)", _QUANTISED, (".qweight",)),
)
_MODELS: _Kinds = (
    ("a Stable Video Diffusion model", "", ("time_stack.", "temporal_transformer_blocks.")),
    ("a Chroma transformer", "", ("distilled_guidance_layer.",)),
    ("a Flux 2 transformer", "", ("double_stream_modulation_img",)),
    ("a Hunyuan video transformer", "", (
        "txt_in.individual_token", "context_embedder.token_refiner.",
    )),
    ("an AuraFlow transformer", "", ("double_layers.0.attn.", "joint_transformer_blocks.0.attn.")),
    ("a Flux transformer", "", (
        "double_blocks.0.img_attn.", "single_transformer_blocks.", "\nsingle_blocks.",
    )),
    ("a Qwen-Image transformer", "", ("transformer_blocks.0.img_mod.", "txt_norm.weight")),
    ("a HiDream transformer", "", ("double_stream_blocks.",)),
    ("an SD 3 transformer", "", ("joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj.")),
    ("a Sana transformer", "", (".conv_inverted.", ".inverted_conv.")),
    ("a video transformer (LTX)", "", ("patchify_proj.", "time_embed.emb.timestep_embedder.")),
    ("a PixArt transformer", "", (
        "caption_projection.linear_1.", "y_embedder.y_proj.", "\nadaln_single.emb.",
    )),
    ("a Stable Cascade model", "", (
        "clip_txt_mapper.", "clip_txt_pooled_mapper.", "effnet_mapper.",
    )),
    ("a Hunyuan-DiT transformer", "", ("mlp_t5.0.", "text_embedding_padding")),
    ("a Lumina or Z-Image transformer", "", ("cap_embedder.", "time_caption_embed.")),
    ("a Kandinsky model", "", ("encoder_hid_proj.image_embeds.", "add_time_condition.")),
    ("a DeepFloyd IF model", "", ("add_embedding.pool.",)),
    ("a Kolors model, which reads text by ChatGLM", "", ("encoder_hid_proj.weight",)),
    ("a latent consistency model (LCM), whose U-Net takes the guidance as an input", (
        "which koala does not read: use its base model with the LCM-LoRA (--lora)"
    ), ("time_embedding.cond_proj.", "time_embed.cond_proj.")),
    ("an SD unCLIP model", "", ("noise_augmentor.",)),
    ("an EDM model, which has another noise schedule (Playground v2.5, CosXL)", "", (
        "edm_mean", "edm_vpred.",
    )),
    ("a video transformer", "", ("head.modulation", "condition_embedder.time_embedder.")),
    ("a video transformer (Mochi)", "", ("time_embed.pooler.",)),
    ("a CogVideoX or CogView transformer", "", ("patch_embed.text_proj.",)),
)  # fmt: skip
_BESIDE: _Kinds = (  # what may also lie in a model's file
    ("a textual inversion of SD 1.5 or SD 2", _UNREAD, ("\nemb_params", "\nstring_to_param")),
    ("a hypernetwork", _UNREAD, (".0.linear.0.weight",)),
    ("norms of a LyCORIS training", _UNREAD, (".w_norm", ".b_norm")),
    ("a tiny autoencoder (TAESD)", "which `koala generate --tiny-vae` reads as a folder", (
        "\nencoder.layers.1.conv.", "decoder.layers.1.", "taesd_decoder.", "\n3.conv.0.weight",
    )),
    ("an upscaler", "", (
        "RRDB_trunk", "body.0.rdb1.", "\nmodel.1.sub.", ".residual_group.", "\nupsampler.",
    )),
    ("a language model", "", (
        "\nmodel.layers.0.self_attn.", ".self_attention.query_key_value.", "\nlm_head.",
    )),
)  # fmt: skip
_IMAGE_ENCODER = "vision_model.encoder.layers.0."
_TEXT_ENCODERS = (
    "text_model.encoder.layers.0.", "transformer.resblocks.0.", "encoder.block.0.layer.0.",
    "\nencoder.layers.0.self_attn.q_proj.",
)  # fmt: skip
_DOWN = (".lora_down.", ".lora_A.", ".lora.down.", "lora_linear_layer.down.", "_lora.down.")


def foreign(shapes: Shapes) -> str:
    """What a file is that koala does not work with, as "a Flux transformer"; "" if it may do."""
    names = "".join(f"\n{name}" for name in shapes)
    unet = find(shapes, UNET_ENDS.values())
    if {*shapes} == {"clip_l", "clip_g"}:
        return "a textual inversion of SDXL, which `koala generate --embedding` reads"
    if found := _first(names, _ADAPTERS):
        return _adapter(shapes, *found)
    if found := _first(names, (*_QUANTISED_KINDS, *_MODELS, *(() if unet else _BESIDE))):
        return ", ".join(part for part in found if part)
    if any(name.endswith(".diff") for name in shapes):
        return f"a whole difference of weights, {_LORA}"
    return "" if unet else _part(shapes, names)


def _first(names: str, kinds: _Kinds) -> tuple[str, str] | None:
    found = ((kind, use) for kind, use, marks in kinds if any(mark in names for mark in marks))
    return next(found, None)


def _adapter(shapes: Shapes, kind: str, use: str) -> str:
    """An adapter of another model than SDXL is not to be applied."""
    family = ""
    if use == _LORA:
        found = of_modules(_modules(shapes))
        family = found[0] if found else _family(shapes, _DOWN)
    elif use == _CONTROL:
        family = _family(shapes, (".attn2.to_k.weight",))
    elif use == _IP_ADAPTER:
        family = _family(shapes, (".to_k_ip.",))
    return f"{kind} for {family}, {_UNREAD}" if family else f"{kind}, {use}"


def _modules(shapes: Shapes) -> dict[str, int | None]:
    """A LoRA's modules, and the width of each one's input."""
    found = (
        (name, shape, mark) for name, shape in shapes.items() for mark in _DOWN if mark in name
    )
    return {n.partition(mark)[0]: s[1] if len(s) > 1 else None for n, s, mark in found}


def _family(shapes: Shapes, marks: tuple[str, ...]) -> str:
    """The model whose text embeddings are as wide as weights that read them; "" for SDXL's."""
    for name, shape in shapes.items():
        reads = "to_k" in name and ("attn2" in name or "_ip." in name)
        if reads and len(shape) > 1 and any(mark in name for mark in marks):
            family = CONTEXTS.get(shape[1], "SDXL")
            return "" if family == "SDXL" else family
    return ""


def _part(shapes: Shapes, names: str) -> str:
    """What a file without a U-Net is."""
    for layout, end in VAE_ENDS.items():
        if find(shapes, [end]):
            return f"a VAE alone, in the {layout} layout, which the option --vae takes"
    if "\nencoder.conv_in." in names and "\ndecoder.conv_in." in names:
        return "an autoencoder of another kind than SDXL's"
    text = any(mark in names for mark in _TEXT_ENCODERS)
    if _IMAGE_ENCODER in names:
        both = "a CLIP model, a text and an image encoder"
        return both if text else (
            "an image encoder, which `koala generate --image-encoder` reads as a folder"
        )  # fmt: skip
    return "a text encoder alone" if text else "an unknown kind of model"


def find(shapes: Shapes, ends: Iterable[str]) -> str:
    """The shortest name that equals or ends with ".END" for one of `ends`; "" if there is none."""
    found = (n for n in shapes for end in ends if n == end or n.endswith("." + end))
    return min(found, key=len, default="")
