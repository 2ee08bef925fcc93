"""Detects what a weights file holds from the names and shapes of its tensors alone.

No configuration is read. The U-Net's architecture is inferred from the shapes and then checked
against the complete list of its tensors, so missing and unexpected tensors are named. Other kinds
of model are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from koala.architectures.layout import tensor_shapes
from koala.architectures.table import ARCHITECTURES, LATENT_CHANNELS, TIME_IDS, UNetArchitecture
from koala.checkpoints import ldm_keys
from koala.checkpoints.validate import Shapes, tensor_faults
from koala.errors import UserError

HEAD, GROUPS, TIME_WIDTH = 64, 32, 256  # SDXL's; shapes do not show them
_UNET_ENDS = {  # layout -> the one tensor that every U-Net has, first stage, first resnet
    "diffusers": "down_blocks.0.resnets.0.time_emb_proj.weight",
    "ldm": "input_blocks.1.0.emb_layers.1.weight",
}
_VAE_ENDS = {
    "diffusers": "encoder.down_blocks.0.resnets.0.conv1.weight",
    "ldm": "encoder.down.0.block.0.conv1.weight",
}
_PART_ENDS = {  # the same for the other components of a single file, whose names are `canonical`
    "vae": tuple(_VAE_ENDS.values()),
    "text_encoder": ("embedders.0.transformer.text_model.final_layer_norm.weight",),
    "text_encoder_2": (
        "embedders.1.model.ln_final.weight",
        "embedders.1.model.text_model.final_layer_norm.weight",
    ),
}
_APPLIED = "which is applied to a model with `koala generate --lora`"
# Kind of file -> substrings of tensor names that identify it. The first match wins.
_FOREIGN = (
    (f"a LoHa, {_APPLIED}", (".hada_w1",)),
    (f"a LoKr, {_APPLIED}", (".lokr_w1", ".lokr_w2")),
    (f"a DoRA, {_APPLIED}", (".dora_scale", ".lora_magnitude_vector")),
    ("an IA3 adapter", (".on_input", ".ia3_l")),
    ("an OFT adapter", (".oft_", ".boft_")),
    (f"a LoRA, {_APPLIED}", (
        ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.",
        "lora_linear_layer.", "_lora.down.", ".lora_mid.",
    )),
    ("a ControlNet", ("controlnet_cond_embedding.", "input_hint_block.", "control_add_embedding.")),
    ("an IP-Adapter, which is applied to a model with `koala generate --ip-adapter`", (
        "ip_adapter.", "to_k_ip.",
    )),
    ("a motion module (AnimateDiff)", ("motion_modules.",)),
    ("a Stable Video Diffusion model", ("time_stack.", "temporal_transformer_blocks.")),
    ("a Flux transformer", (
        "double_blocks.0.img_attn.", "single_transformer_blocks.0.proj_mlp.",
    )),
    ("an SD 3 transformer", ("joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj.")),
    ("a PixArt transformer", ("caption_projection.linear_1.", "y_embedder.y_proj.")),
    ("an AuraFlow transformer", ("double_layers.0.attn.", "joint_transformer_blocks.0.attn.")),
    ("a Stable Cascade model", ("clip_txt_mapper.", "clip_txt_pooled_mapper.")),
    ("a Hunyuan-DiT transformer", ("mlp_t5.0.",)),
    ("a Lumina or Z-Image transformer", ("cap_embedder.",)),
    ("an EDM model, which has another noise schedule (Playground v2.5, CosXL)", (
        "edm_mean", "edm_vpred.",
    )),
    ("a video transformer", ("head.modulation", "patchify_proj.", "txt_in.individual_token")),
)  # fmt: skip
_BESIDE = (  # the same, of what may also lie in a model's file
    ("a textual inversion of SD 1.5 or SD 2", ("emb_params", "string_to_param")),
    ("a tiny autoencoder (TAESD)", ("decoder.layers.1.", "taesd_decoder.")),
    ("an upscaler (ESRGAN)", ("RRDB_trunk", "body.0.rdb1.")),
)
_FAMILIES = {768: "SD 1.5", 1024: "SD 2"}  # U-Nets without an addition embedding, by text width


@dataclass(frozen=True)
class Detected:
    """What a file with an SDXL-class U-Net holds."""

    architecture: UNetArchitecture
    layout: str  # "diffusers" or "ldm", SDXL's original one
    prefix: str  # of the U-Net's tensors
    components: tuple[str, ...]  # of a pipeline: "unet" and any of the other three with weights


def foreign(shapes: Shapes) -> str:
    """What a file is that koala does not work with, as "a Flux transformer"; "" if it may do."""
    if {*shapes} == {"clip_l", "clip_g"}:
        return "a textual inversion of SDXL, which `koala generate --embedding` reads"
    unet = _find(shapes, _UNET_ENDS.values())
    for kind, marks in (*_FOREIGN, *(() if unet else _BESIDE)):
        if any(mark in name for name in shapes for mark in marks):
            return kind
    if any(name.endswith(".diff") for name in shapes):
        return f"a whole difference of weights, {_APPLIED}"
    if unet:
        return ""
    for layout, end in _VAE_ENDS.items():
        if _find(shapes, [end]):
            return f"a VAE alone, in the {layout} layout"
    text = ("text_model.encoder.layers.0.", "transformer.resblocks.0.", "encoder.block.0.layer.0.",
            "encoder.layers.0.self_attn.q_proj.")  # fmt: skip
    if any(mark in name for name in shapes for mark in text):
        return "a text encoder alone"
    return "an unknown kind of model"


def detect(shapes: Shapes, stated: UNetArchitecture | None = None) -> Detected:
    """Detects what a file holds from the names and shapes of its tensors.

    `stated`: the U-Net according to the file's own metadata; accepted if the tensors match it.
    Raises `UserError` naming the kind of file if it has no SDXL-class U-Net, or the U-Net's
    missing and unexpected tensors.
    """
    if kind := foreign(shapes):
        raise UserError(f"this is {kind}, not a Stable Diffusion XL model")
    layout, end = next((k, e) for k, e in _UNET_ENDS.items() if _find(shapes, [e]))
    prefix = _find(shapes, [end]).removesuffix(end)
    unet = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    if not prefix:  # a pipeline whose U-Net has no prefix: skip the other components
        unet = {
            n: s for n, s in unet.items() if not n.startswith(tuple(ldm_keys.PREFIXES.values()))
        }
    reader = _Reader(unet, layout)
    if len(conv_in := reader.shape("conv_in")) == 4:
        _refuse_other_inputs(conv_in[1])
    arch = stated or _described(reader)
    _compare(unet, arch, layout)
    found = [component for component, ends in _PART_ENDS.items() if _find(shapes, ends)]
    return Detected(arch, layout, prefix, ("unet", *found))


def _find(shapes: Shapes, ends: Iterable[str]) -> str:
    """The shortest name that equals or ends with ".END" for one of `ends`; "" if there is none."""
    found = (n for n in shapes for end in ends if n == end or n.endswith("." + end))
    return min(found, key=len, default="")


# --- the U-Net's row ------------------------------------------------------------------------


class _Reader:
    """A U-Net's tensors by their diffusers paths, in either layout."""

    def __init__(self, shapes: Shapes, layout: str):
        self.shapes, self.layout = shapes, layout
        self.paths: set[str] = set()  # of every module with tensors, its own or a child's
        for name in shapes:
            while (name := name.rpartition(".")[0]) and name not in self.paths:
                self.paths.add(name)
        if layout == "ldm":  # the first downsampler comes after the first stage's resnets
            ends = [i for i in range(2, 10) if f"input_blocks.{i}.0.op" in self.paths]
            self.layers = ends[0] - 1 if ends else 0
        else:
            self.layers = self._count("down_blocks.0.resnets")

    def _count(self, path: str) -> int:
        """Number of a module's children, numbered from 0."""
        n = 0
        while f"{path}.{n}" in self.paths:
            n += 1
        return n

    def _path(self, path: str) -> str:
        return path if self.layout == "diffusers" else ldm_keys.unet_module(path, self.layers)

    def shape(self, path: str) -> tuple[int, ...]:
        """Of the module's weight; () if there is none."""
        return self.shapes.get(f"{self._path(path)}.weight", ())

    def depth(self, attentions: str) -> int:
        """Transformer blocks of a transformer."""
        return self._count(self._path(f"{attentions}.transformer_blocks"))


def _described(reader: _Reader) -> UNetArchitecture:
    """The architecture inferred from the shapes; `UserError` if it is not an SDXL-class U-Net."""
    stages = 0
    while reader.layers and len(reader.shape(f"down_blocks.{stages}.resnets.0.conv1")) == 4:
        stages += 1
    if not stages or len(reader.shape("conv_in")) != 4:
        raise UserError("this is an unknown kind of U-Net: its blocks are not those of SDXL")
    widths = tuple(reader.shape(f"down_blocks.{i}.resnets.0.conv1")[0] for i in range(stages))
    depths = tuple(reader.depth(f"down_blocks.{i}.attentions.0") for i in range(stages))
    up = tuple(
        tuple(reader.depth(f"up_blocks.{i}.attentions.{j}") for j in range(reader.layers + 1))
        for i in range(stages)
    )
    mid = (
        reader.depth("mid_block.attentions.0")
        if reader.shape("mid_block.resnets.0.conv1")
        else None
    )
    first = next((i for i, depth in enumerate(depths) if depth), 0)
    transformer = f"down_blocks.{first}.attentions.0"
    context = (0, *reader.shape(f"{transformer}.transformer_blocks.0.attn2.to_k"))[-1]
    added = (0, *reader.shape("add_embedding.linear_1"))[-1]
    _refuse_relatives(widths, context, added)
    pooled, time_ids, heads, groups, sample, tokens = _unseen(widths, context, added)
    arch = UNetArchitecture(
        "custom", sample, tokens, widths, heads, reader.layers, depths, up, mid,
        context, pooled, time_ids, groups, linear=len(reader.shape(f"{transformer}.proj_in")) == 2,
    )  # fmt: skip
    return next((row for row in ARCHITECTURES.values() if row == arch), arch)


def _refuse_other_inputs(channels: int) -> None:
    kind = {9: "an inpainting U-Net", 8: "an instruct-pix2pix U-Net"}.get(channels)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"this is {kind or 'an unknown kind of U-Net'}: it has {channels} input channels, "
            f"SDXL's has {LATENT_CHANNELS}"
        )


def _refuse_relatives(widths: tuple[int, ...], context: int, added: int) -> None:
    if widths[0] == 384 and context == 1280:
        raise UserError("this is the SDXL refiner, not a Stable Diffusion XL base model")
    if not added:
        kind = _FAMILIES.get(context, "an unknown kind of U-Net")
        raise UserError(
            f"this is {kind}: its U-Net has no addition embedding (pooled text and size), SDXL's "
            "has one"
        )
    if not context:
        raise UserError("this is an unknown kind of U-Net: it has no attention")


def _unseen(widths: tuple[int, ...], context: int, added: int) -> tuple:
    """Settings that shapes do not show: a known row's of the same widths, else SDXL's.

    (pooled, time_ids, heads, groups, sample, tokens), see `UNetArchitecture`.
    """
    for row in ARCHITECTURES.values():
        inputs = (row.widths, row.context, row.pooled + TIME_IDS * row.time_ids)
        if row.pooled and inputs == (widths, context, added):
            return row.pooled, row.time_ids, row.heads, row.groups, row.sample, row.tokens
    pooled = added - TIME_IDS * TIME_WIDTH
    if pooled <= 0 or any(width % HEAD or not width for width in widths):
        raise UserError(
            f"this is an unknown kind of U-Net: widths {list(widths)} and an addition embedding "
            f"of {added} match no known model, nor heads of {HEAD} channels and size embeddings "
            f"of {TIME_WIDTH}; use its folder with config.json instead"
        )
    return pooled, TIME_WIDTH, tuple(width // HEAD for width in widths), GROUPS, 128, 77


def unet_shapes(arch: UNetArchitecture, layout: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a U-Net in that layout, without prefix."""
    shapes = tensor_shapes(arch)
    if layout == "diffusers":
        return shapes
    return {pair.single: shapes[pair.parts[0]] for pair in ldm_keys.unet_pairs(arch)}


def _compare(unet: Shapes, arch: UNetArchitecture, layout: str) -> None:
    """Raises `UserError` unless `unet` has exactly the tensors of `arch`."""
    if not tensor_faults(unet_shapes(arch, layout), unet):
        return
    rows = [arch, *ARCHITECTURES.values()]
    nearest = min(rows, key=lambda row: len(unet_shapes(row, layout).items() ^ unet.items()))
    faults = tensor_faults(unet_shapes(nearest, layout), unet)
    raise UserError(f"the nearest known U-Net is {nearest.name}; {faults}")
