"""What a U-Net of each kind is, as data: one row each, visible on one screen.

Everything else about a U-Net follows from its row and is computed here in plain Python, so that
`koala architectures` answers at once: the diffusers configuration, the name and shape of every
tensor, the parameter count and the cost of one forward. A student is not written down twice: it
is its teacher's row and a `Cut`.

Depths are transformer blocks per resnet of a stage; 0 means the stage has no attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from koala.errors import UserError, unknown
from koala.unet_layout import LATENT_CHANNELS, TIME_IDS, modules, tensor_shapes

FACTOR = 8  # pixels along one side of a latent position: every VAE of the family is f8


@dataclass(frozen=True)
class UNetArchitecture:
    """One U-Net, in diffusers' `UNet2DConditionModel` terms.

    Two rows are equal when every tensor of theirs has the same name, shape and use: `name`,
    `sample` and `tokens` are labels, and SDXL-Turbo (64) is the same U-Net as SDXL (128).
    """

    name: str = field(compare=False)
    sample: int = field(compare=False)  # native side of the latents
    tokens: int = field(compare=False)  # text tokens at the native prompt length
    widths: tuple[int, ...]  # channels of each stage
    heads: tuple[int, ...]  # attention heads of each stage
    layers: int  # resnets of a down block; an up block has one more
    depths: tuple[int, ...]  # transformer blocks per resnet, DW-1 first
    up: tuple[tuple[int, ...], ...]  # the same for every resnet of every up block, UP-1 first
    mid: int | None  # transformer blocks of the mid block; 0: one resnet; None: no mid block
    context: int  # width of the text embeddings
    pooled: int  # width of the pooled text embedding; 0: no added conditioning (before SDXL)
    time_ids: int  # width of the embedding of one of the six size and crop numbers
    groups: int  # of every group norm
    linear: bool  # transformer projections are linear (else 1x1 convolutions)


@dataclass(frozen=True)
class Cut:
    """How a student is cut out of its teacher (KOALA, section 3.1)."""

    layers: int
    depth: tuple[Fraction, ...]  # share of the teacher's depth that stays, per stage, rounded up
    mid: bool


HALF, THREE_FIFTHS, ALL = Fraction(1, 2), Fraction(3, 5), Fraction(1)
CUTS = {
    "bk-sdxl": Cut(1, (ALL, ALL, ALL), mid=True),
    "koala-1b": Cut(1, (ALL, ALL, THREE_FIFTHS), mid=True),
    "koala-700m": Cut(1, (ALL, ALL, HALF), mid=False),
}


def _mirrored(depths: tuple[int, ...], layers: int) -> tuple[tuple[int, ...], ...]:
    return tuple((depth,) * (layers + 1) for depth in reversed(depths))


_SSD_UP = ((4, 4, 10), (2, 1, 1), (0, 0, 0))

# One head's width gives the heads of every stage; up None mirrors the down depths.
# fmt: off
_ROWS: tuple[tuple[Any, ...], ...] = (
    # name       sample text widths  head layers depths   up   mid context pooled time_ids groups
    ("sdm-v2.0",     96, 77, (320, 640, 1280, 1280), 64, 2, (1, 1, 1, 0), None, 1, 1024, 0, 0, 32),
    ("sdxl",        128, 77, (320, 640, 1280), 64, 2, (0, 2, 10), None,    10, 2048, 1280, 256, 32),
    ("ssd-1b",      128, 77, (320, 640, 1280), 64, 2, (0, 2, 4),  _SSD_UP,  0, 2048, 1280, 256, 32),
    ("segmind-vega", 128, 77, (320, 640, 1280), 64, 2, (0, 1, 2), None,     0, 2048, 1280, 256, 32),
    ("sdxl-mini",    16, 32, (64, 96, 128),    32, 2, (0, 1, 2),  None,     2,  160,   96,  32, 16),
)
# fmt: on
_STUDENTS = (  # name, teacher, cut
    ("bk-sdxl", "sdxl", "bk-sdxl"),
    ("koala-1b", "sdxl", "koala-1b"),
    ("koala-700m", "sdxl", "koala-700m"),
    ("koala-mini-1b", "sdxl-mini", "koala-1b"),
    ("koala-mini", "sdxl-mini", "koala-700m"),
)
_ORDER = (
    "sdm-v2.0", "sdxl", "bk-sdxl", "koala-1b", "koala-700m", "ssd-1b", "segmind-vega",
    "sdxl-mini", "koala-mini-1b", "koala-mini",
)  # fmt: skip


def teacher_faults(teacher: UNetArchitecture) -> list[str]:
    """What keeps `teacher` from being an SDXL U-Net, one phrase a fault; empty if nothing does."""
    faults = []
    if not teacher.pooled:
        faults.append("has no addition embedding (pooled text and size), an SDXL U-Net has one")
    if len(teacher.depths) != 3:
        faults.append(f"has {len(teacher.depths)} stages, an SDXL U-Net has 3")
    if teacher.layers != 2:
        faults.append(f"has layers_per_block {teacher.layers}, an SDXL U-Net has 2")
    if not teacher.mid:
        mid = "no mid block" if teacher.mid is None else "a mid block without attention"
        faults.append(f"has {mid}, an SDXL U-Net has one with attention")
    if teacher.up != _mirrored(teacher.depths, teacher.layers):
        faults.append("has up blocks whose depths do not mirror the down blocks'")
    if not faults and teacher.mid != teacher.depths[-1]:
        faults.append(f"has mid depth {teacher.mid}, not that of its last stage")
    return faults


def student_of(teacher: UNetArchitecture, to: str) -> UNetArchitecture:
    """The student that `to` makes of `teacher`: the same rule at every size.

    to: a name in `CUTS`, or depths of one's own, "0,2,4": transformer blocks per resnet of each
    stage, one layer a block; ",no-mid" at the end leaves the mid block out, which else is as deep
    as the last stage. Raises `UserError` if `to` is neither, the teacher is not an SDXL U-Net, or
    has not that many blocks.
    """
    if faults := teacher_faults(teacher):
        raise UserError(f"{teacher.name} cannot be the teacher: {'; '.join(faults)}")
    if cut := CUTS.get(to):
        layers, mid = cut.layers, cut.mid
        depths = tuple(math.ceil(d * s) for d, s in zip(teacher.depths, cut.depth, strict=True))
    else:
        layers, mid = 1, not to.endswith(_NO_MID)
        depths = _own_depths(to, teacher)
    student = replace(
        teacher,
        name=f"{to} of {teacher.name}" if cut else "custom",
        layers=layers,
        depths=depths,
        up=_mirrored(depths, layers),
        mid=depths[-1] if mid else None,
    )
    for name, of, by in _STUDENTS:
        if to == by and teacher == ARCHITECTURES.get(of):
            return replace(student, name=name)
    return next((row for row in ARCHITECTURES.values() if row == student), student)


_NO_MID = ",no-mid"


def _own_depths(to: str, teacher: UNetArchitecture) -> tuple[int, ...]:
    """The depths in "0,2,4" or "0,2,4,no-mid"; `UserError` if they are none for `teacher`."""
    numbers = to.removesuffix(_NO_MID).split(",")
    if not all(number.isascii() and number.isdigit() and len(number) < 4 for number in numbers):
        raise unknown("student", to, CUTS, f", or depths such as 0,2,4 or 0,2,4{_NO_MID}")
    depths = tuple(map(int, numbers))
    pairs = zip(depths, teacher.depths, strict=False)
    if len(depths) != len(teacher.depths) or not any(depths) or any(s > t for s, t in pairs):
        most = ",".join(map(str, teacher.depths))
        raise UserError(
            f"depths {','.join(map(str, depths))} cannot be cut out of {most}: needed are "
            f"{len(teacher.depths)} numbers, none above the teacher's, not all 0"
        )
    return depths


def _row(
    name: str, sample: int, tokens: int, widths: tuple[int, ...], head: int, layers: int,
    depths: tuple[int, ...], up: tuple[tuple[int, ...], ...] | None, mid: int | None,
    context: int, pooled: int, time_ids: int, groups: int,
) -> UNetArchitecture:  # fmt: skip
    heads = tuple(width // head for width in widths)
    up = up or _mirrored(depths, layers)
    return UNetArchitecture(
        name, sample, tokens, widths, heads, layers, depths, up, mid,
        context, pooled, time_ids, groups, linear=True,
    )  # fmt: skip


ARCHITECTURES: dict[str, UNetArchitecture] = {}
for _values in _ROWS:
    ARCHITECTURES[_values[0]] = _row(*_values)
for _name, _teacher, _cut in _STUDENTS:
    ARCHITECTURES[_name] = student_of(ARCHITECTURES[_teacher], _cut)
ARCHITECTURES = {name: ARCHITECTURES[name] for name in _ORDER}


def get(name: str) -> UNetArchitecture:
    """The architecture of that name; `UserError` lists the names."""
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


# --- diffusers' configuration ---------------------------------------------------------------


def unet_config(arch: UNetArchitecture) -> dict[str, Any]:
    """Keyword arguments of diffusers' `UNet2DConditionModel`."""
    mid = {None: None, 0: "UNetMidBlock2D"}.get(arch.mid, "UNetMidBlock2DCrossAttn")
    config: dict[str, Any] = {
        "sample_size": arch.sample,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in arch.depths],
        "mid_block_type": mid,
        "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in arch.up],
        "block_out_channels": list(arch.widths),
        "layers_per_block": arch.layers,
        # A stage without attention has the entry 1, as in the published SDXL configuration.
        "transformer_layers_per_block": [max(1, depth) for depth in arch.depths],
        "attention_head_dim": list(arch.heads),  # by an old slip of that class: number of heads
        "cross_attention_dim": arch.context,
        "norm_num_groups": arch.groups,
        "use_linear_projection": arch.linear,
    }
    if arch.up != _mirrored(arch.depths, arch.layers):
        config["reverse_transformer_layers_per_block"] = [
            list(stage) if any(stage) else 1 for stage in arch.up
        ]
    depth = config["transformer_layers_per_block"][-1]
    assert not arch.mid or arch.mid == depth, "diffusers' mid block is as deep as the last stage"
    if arch.pooled:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": arch.time_ids,
            "projection_class_embeddings_input_dim": arch.pooled + TIME_IDS * arch.time_ids,
        }
    return config


# Settings that change the computation and that no row can express: they must be as in SDXL.
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": (None, "UNet2DConditionModel"),
    "in_channels": (LATENT_CHANNELS,),
    "out_channels": (LATENT_CHANNELS,),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (None, False),
    "dual_cross_attention": (None, False),
    "conv_in_kernel": (None, 3),
    "conv_out_kernel": (None, 3),
    "resnet_time_scale_shift": (None, "default"),
    "attention_type": (None, "default"),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
}
_CLASS_DEFAULTS: dict[str, Any] = {  # diffusers' defaults of keys that a config may leave out
    "in_channels": 4,
    "out_channels": 4,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "sample_size": 64,
}


def _per_stage(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with diffusers' defaults; `UserError` for what no row can express."""
    config = {**_CLASS_DEFAULTS, **config}
    for key, allowed in _FIXED.items():
        if config.get(key) not in allowed:
            names = " or ".join(repr(a) for a in allowed if a is not None) or "none"
            raise UserError(f"U-Net setting {key} is {config.get(key)!r}; must be {names}")
    missing = [k for k in ("block_out_channels", "cross_attention_dim") if k not in config]
    if missing:
        raise UserError(f"U-Net configuration lacks {', '.join(missing)}")
    return config


def from_unet_config(config: Mapping[str, Any]) -> UNetArchitecture:
    """The architecture that a U-Net's `config.json` describes, named if it is a known one.

    Raises `UserError` naming the setting if it is no U-Net of this kind.
    """
    config = _checked(config)
    widths = tuple(config["block_out_channels"])
    stages = len(widths)
    down_types = config.get("down_block_types") or ()
    up_types = config.get("up_block_types") or ()
    if len(down_types) != stages or len(up_types) != stages:
        raise UserError(f"U-Net configuration has {stages} widths but other numbers of blocks")
    strange = {*down_types, *up_types} - {
        "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
    }  # fmt: skip
    if strange:
        raise UserError(f"U-Net block type {min(strange)!r} is none of SDXL's")
    layers, per_stage = config["layers_per_block"], config["transformer_layers_per_block"]
    heads = _per_stage(config.get("num_attention_heads") or config["attention_head_dim"], stages)
    per_stage = _per_stage(per_stage, stages)
    if not isinstance(layers, int) or not all(isinstance(d, int) for d in per_stage):
        raise UserError("U-Net layers_per_block must be one number, depths one number a stage")
    reverse = config.get("reverse_transformer_layers_per_block") or per_stage[::-1]
    if not len(heads) == len(per_stage) == len(reverse) == stages:
        raise UserError(f"U-Net configuration has {stages} widths but other numbers of depths")
    has_attention = [kind.startswith("CrossAttn") for kind in down_types]
    up = tuple(
        tuple(_per_stage(depth, layers + 1))
        if kind.startswith("CrossAttn")
        else (0,) * (layers + 1)
        for kind, depth in zip(up_types, reverse, strict=True)
    )
    if any(len(stage) != layers + 1 for stage in up):
        raise UserError(f"U-Net up blocks have {layers + 1} layers but other numbers of depths")
    mid = {None: None, "UNetMidBlock2D": 0}.get(config["mid_block_type"], per_stage[-1])
    time_ids = config.get("addition_time_embed_dim") or 0
    has_addition = config.get("addition_embed_type") == "text_time"
    added = config.get("projection_class_embeddings_input_dim") or 0
    arch = UNetArchitecture(
        name="custom",
        sample=config["sample_size"],
        tokens=77,
        widths=widths,
        heads=tuple(heads),
        layers=layers,
        depths=tuple(d if a else 0 for d, a in zip(per_stage, has_attention, strict=True)),
        up=up,
        mid=mid,
        context=config["cross_attention_dim"],
        pooled=added - TIME_IDS * time_ids if has_addition else 0,
        time_ids=time_ids if has_addition else 0,
        groups=config["norm_num_groups"],
        linear=bool(config.get("use_linear_projection")),
    )
    known = next((a for a in ARCHITECTURES.values() if a == arch), None)
    return replace(arch, name=known.name, tokens=known.tokens) if known else arch


def identify(config: Mapping[str, Any]) -> str:
    """Name of the architecture that a U-Net configuration describes, or "custom"."""
    return from_unet_config(config).name


# --- parameters, cost, table ------------------------------------------------------------------


def parameters(arch: UNetArchitecture) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in tensor_shapes(arch).values())


def flops(arch: UNetArchitecture, height: int, width: int, tokens: int) -> int:
    """Floating-point operations of one forward for one picture of `height` x `width` pixels.

    A multiply and its add count as two. Counted are convolutions, linear layers and the two
    products of every attention; norms, activations, additions and softmax are not, as in
    `torch.utils.flop_counter`.
    """
    sides = [(math.ceil(height / FACTOR), math.ceil(width / FACTOR))]
    while len(sides) < len(arch.widths):  # a downsampler rounds an odd side up
        sides.append((math.ceil(sides[-1][0] / 2), math.ceil(sides[-1][1] / 2)))
    positions: dict[int | str, int] = {i: h * w for i, (h, w) in enumerate(sides)}
    positions |= {"text": tokens, "vector": 1}
    total = 0
    for module in modules(arch):
        n = positions[module.at]
        if module.attends:
            keys = n if module.attends == "self" else tokens
            total += 2 * 2 * n * keys * module.bias
        elif len(module.weight) > 1:
            total += 2 * n * math.prod(module.weight)
    return total


def table() -> list[dict[str, Any]]:
    """One row an architecture: what `koala architectures` prints; JSON-able."""
    rows = []
    for arch in ARCHITECTURES.values():
        count, side = parameters(arch), arch.sample * FACTOR
        rows.append(
            {
                "name": arch.name,
                "parameters": count,
                "fp32_checkpoint_gb": round(4 * count / 1e9, 4),
                "depths": list(arch.depths),
                "up_depths": [list(stage) for stage in arch.up],
                "mid": arch.mid,
                "native_pixels": side,
                "tflop": round(flops(arch, side, side, arch.tokens) / 1e12, 6),
            }
        )
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `table()` as aligned text for a terminal, one line each under a heading."""
    head = ("U-Net", "parameters", "fp32 GB", "Tx blocks, DW", "mid", "pixels", "TFLOP a forward")
    mids = {None: "none", 0: "one resnet"}
    cells = [head] + [
        (
            row["name"],
            f"{row['parameters']:,}",
            f"{row['fp32_checkpoint_gb']:#.3g}",
            str(row["depths"]).replace(" ", ""),
            mids.get(row["mid"], f"yes ({row['mid']})"),
            str(row["native_pixels"]),
            f"{row['tflop']:#.3g}",
        )
        for row in rows
    ]
    sizes = [max(len(line[i]) for line in cells) for i in range(len(head))]
    right = (False, True, True, False, False, True, True)
    lines = [
        "  ".join(
            cell.rjust(n) if r else cell.ljust(n)
            for cell, n, r in zip(line, sizes, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)
