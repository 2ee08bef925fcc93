"""Detects what a weights file holds from the names and shapes of its tensors alone.

No configuration is read. The U-Net's architecture is inferred from the shapes and then checked
against the complete list of its tensors, so missing and unexpected tensors are named. Other kinds
of model are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from koala.architectures.layout import tensor_shapes
from koala.architectures.table import ARCHITECTURES, LATENT_CHANNELS, TIME_IDS, UNetArchitecture
from koala.checkpoints import ldm_keys
from koala.checkpoints.foreign import UNET_ENDS, VAE_ENDS, find, foreign
from koala.checkpoints.lora_families import CONTEXTS
from koala.checkpoints.validate import INPUTS, Shapes, tensor_faults
from koala.errors import UserError

HEAD, GROUPS, TIME_WIDTH = 64, 32, 256  # SDXL's; shapes do not show them
_PART_ENDS = {  # the same for the other components of a single file, whose names are `canonical`
    "vae": tuple(VAE_ENDS.values()),
    "text_encoder": ("embedders.0.transformer.text_model.final_layer_norm.weight",),
    "text_encoder_2": (
        "embedders.1.model.ln_final.weight",
        "embedders.1.model.text_model.final_layer_norm.weight",
    ),
}


@dataclass(frozen=True)
class Detected:
    """What a file with an SDXL-class U-Net holds."""

    architecture: UNetArchitecture
    layout: str  # "diffusers" or "ldm", SDXL's original one
    prefix: str  # of the U-Net's tensors
    components: tuple[str, ...]  # of a pipeline: "unet" and any of the other three with weights


def detect(shapes: Shapes, stated: UNetArchitecture | None = None) -> Detected:
    """Detects what a file holds from the names and shapes of its tensors.

    `stated`: the U-Net according to the file's own metadata; accepted if the tensors match it.
    Raises `UserError` naming the kind of file if it has no SDXL-class U-Net, or the U-Net's
    missing and unexpected tensors.
    """
    if kind := foreign(shapes):
        raise UserError(f"this is not a Stable Diffusion XL model but {kind}")
    layout, end = next((k, e) for k, e in UNET_ENDS.items() if find(shapes, [e]))
    prefix = find(shapes, [end]).removesuffix(end)
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
    found = [component for component, ends in _PART_ENDS.items() if find(shapes, ends)]
    return Detected(arch, layout, prefix, ("unet", *found))


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
    kind = INPUTS.get(channels)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"this is {kind or 'an unknown kind of U-Net'}: it has {channels} input channels, "
            f"SDXL's has {LATENT_CHANNELS}"
        )


def _refuse_relatives(widths: tuple[int, ...], context: int, added: int) -> None:
    if widths[0] == 384 and context == 1280:
        raise UserError("this is the SDXL refiner, not a Stable Diffusion XL base model")
    if not added:
        kind = CONTEXTS.get(context, "an unknown kind of U-Net")
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
