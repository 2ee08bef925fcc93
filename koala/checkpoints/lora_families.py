"""Families of models that LoRAs are made for, told by names and shapes of tensors and metadata.

A LoRA of another family than SDXL is refused by the family's name. Names are compared with every
dot as an underscore, so kohya's and dotted names need one pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

STATED = ("ss_base_model_version", "modelspec.architecture")  # kohya's metadata, and Stability's
SD, SD_1, SD_2 = "SD 1.5 or SD 2", "SD 1.5", "SD 2"
_OTHER = "another diffusion transformer"
KOLORS, REFINER = "Kolors", "the SDXL refiner"
CONTEXTS = {768: SD_1, 1024: SD_2, 1280: REFINER, 2048: "SDXL"}  # widths of the text embeddings
_REFINER_WIDTHS = {384, 768, 1536}  # of its stages; SDXL's are 320, 640 and 1280
_PREFIXES = re.compile(r"^(?:(?:base_model\.model|transformer|diffusion_model|model)\.)+")
_UNET = re.compile(r"(?:down|up|input|output)_blocks|mid_block|middle_block")
_TOP = r"(?<!\d_)transformer_blocks_\d+"  # not within a U-Net's block


class Family(NamedTuple):
    """A kind of model, and the tensors of its LoRAs that no other family before it has."""

    name: str
    marks: str  # pattern in a module's name
    widths: tuple[int, ...] = ()  # of the module's input; (): any


# The first match wins: those with the most telling names come first.
FAMILIES = (
    Family("AnimateDiff", r"motion_modules"),
    Family("Flux.2", r"double_stream_modulation|to_qkv_mlp_proj"),
    Family("Flux.2", r"double_blocks_\d+_img_attn_qkv", (4096, 6144)),
    Family("Chroma", r"distilled_guidance_layer"),
    Family("HunyuanVideo", r"double_blocks_\d+_(img|txt)_mlp_fc\d|token_refiner"
                           r"|double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)"),
    Family("AuraFlow", r"joint_transformer_blocks_\d|double_layers_\d|single_layers_\d"),
    Family("HiDream", r"(double|single)_stream_blocks_\d"),
    Family("Flux", r"double_blocks_\d|single_blocks_\d|single_transformer_blocks_\d"),
    Family("Qwen-Image", _TOP + r"_(img|txt)_(mlp|mod)"),
    Family("Qwen-Image", _TOP + r"_attn_(to|add)_", (3072,)),
    Family("SD 3", r"joint_blocks_\d|" + _TOP + r"_attn_(to|add)_"),
    Family("Mochi", _TOP + r"_attn1_(add_[qkv]_proj|to_add_out)"),
    Family("Sana", r"conv_inverted|conv_depth"),
    Family("Sana", _TOP, (2240,)),
    Family("PixArt", _TOP, (1152,)),
    Family("LTX-Video", _TOP, (2048, 4096)),
    Family("CogVideoX", _TOP, (1920, 3072)),
    Family(_OTHER, _TOP),
    Family("Z-Image", r"(layers|refiner)_\d+_(attention|feed_forward)_", (3840,)),
    Family("Z-Image or Lumina", r"layers_\d+_attention_(to_|qkv|out)|(context|noise)_refiner_\d"
                                r"|layers_\d+_feed_forward_w\d|cap_embedder"),
    Family("Cosmos or Anima", r"blocks_\d+_(self|cross)_attn_(q|k|v|output)_proj"
                              r"|blocks_\d+_mlp_layer\d"),
    Family("Hunyuan-DiT", r"blocks_\d+_attn\d_(Wqkv|q_proj|kv_proj|out_proj)|te\d?_bert"),
    Family("Wan", r"blocks_\d+_(self|cross)_attn_[qkvo]|blocks_\d+_ffn_"
                  r"|(?<!transformer_)(?<!down_)(?<!up_)blocks_\d+_attn\d_(to|add)_"),
    Family("Stable Cascade", r"lora_prior_|clip_txt|(down|up)_blocks_\d+_\d+_(attention"
                             r"|channelwise|kv_mapper|mapper)"),
    Family("Kandinsky or DeepFloyd IF", r"attentions_\d+_(add_[kv]_proj|to_[qkv])"),
    Family("Stable Video Diffusion", r"temporal_transformer_blocks|time_stack"),
    Family("a video model (ModelScope)", r"temp_attentions|temp_convs|transformer_in_"),
    Family(KOLORS, r"encoder_hid_proj|query_key_value|dense_h_to_4h"),
    Family(KOLORS, r"add_embedding_linear_1|label_emb_0_0", (5632,)),
    Family("Flux, SD 3 or another model with a T5", r"encoder_block_\d+_layer_\d"),
    Family("OmniGen", r"layers_\d+_self_attn_qkv_proj"),
    Family("a language model", r"^(base_model_)?(model_)*layers_\d+_(self_attn|mlp)_"),
    Family(SD_1, r"^lora_te_.*text_model", (768, 3072)),
    Family(SD_2, r"^lora_te_.*text_model", (1024, 4096)),
    Family(SD, r"^lora_te_text_model"),
    Family(SD, r"(down_blocks_0|up_blocks_3)_attentions|input_blocks_[12]_1_"
               r"|output_blocks_(9|10|11)_1_"),
)  # fmt: skip
_NAMES = (  # the same as metadata names them: family -> pattern
    (REFINER, r"refiner"),
    ("SDXL", r"sdxl|stable-diffusion-xl|pony|illustrious|noobai|animagine"),
    (SD_1, r"sd_?v?1|stable-diffusion-v1"),
    (SD_2, r"sd_?v?2|stable-diffusion-v2"),
    ("SD 3", r"sd_?3|stable-diffusion-3|stable-diffusion-v3"),
    ("Flux.2", r"flux[-_.]?2"),
    ("Flux", r"flux"),
    (KOLORS, r"kolors"),
    ("Z-Image", r"z[-_]?image"),
    ("Lumina", r"lumina"),
    ("Qwen-Image", r"qwen"),
    ("Wan", r"wan"),
    ("Hunyuan-DiT", r"hunyuan[-_]?dit"),
    ("HunyuanVideo", r"hunyuan[-_]?video|framepack"),
    ("HunyuanImage", r"hunyuan"),
    ("LTX-Video", r"ltx"),
    ("CogVideoX", r"cogvideo"),
    ("PixArt", r"pixart"),
    ("Sana", r"sana"),
    ("Stable Cascade", r"cascade|w[ue]+rstchen"),
    ("AuraFlow", r"aura[-_]?flow"),
    ("HiDream", r"hidream"),
    ("Chroma", r"chroma"),
    ("Cosmos or Anima", r"cosmos|anima"),
    ("Kandinsky", r"kandinsky"),
    ("Stable Video Diffusion", r"stable-video"),
)


def of_modules(modules: Mapping[str, int | None]) -> tuple[str, str] | None:
    """(family, a module that tells it) of a LoRA's modules: name -> width of its input, if known.

    None where no name tells. SDXL is none of them.
    """
    short = {name: _PREFIXES.sub("", name, count=1) for name in modules}
    for family in FAMILIES:
        pattern = re.compile(family.marks)
        for name, width in modules.items():
            spellings = (short[name], short[name].replace(".", "_"))
            fits = not family.widths or width in family.widths
            if fits and any(pattern.search(spelling) for spelling in spellings):
                return _more_exact(family.name, modules.items()), name
    others = (n for n in modules if n.startswith(("transformer.", "lora_transformer_")))
    other = next((name for name in others if not _UNET.search(name)), None)
    return None if other is None else (_OTHER, other)


def _more_exact(family: str, modules: Iterable[tuple[str, int | None]]) -> str:
    """SD 1.5 and SD 2 share most names; they are told apart by the width of the text embeddings."""
    if family != SD:
        return family
    contexts = {width for name, width in modules if re.search(r"attn2.to_[kv]$", name)}
    return next((CONTEXTS[w] for w in contexts if w in (768, 1024)), family)


def of_widths(widths: Iterable[int]) -> str:
    """The family of inputs of these widths, where SDXL's differ; "" if it is not known."""
    return REFINER if {*widths} and {*widths} <= _REFINER_WIDTHS else ""


def of_metadata(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(family, what says so) by a file's metadata; None if it says nothing that is known."""
    for key in STATED:
        said = metadata.get(key, "").lower()
        for family, pattern in _NAMES:
            if re.match(pattern, said) or re.search(rf"(?<![a-z])(?:{pattern})", said):
                return family, f"{key} is {metadata[key]!r}"
    return None
