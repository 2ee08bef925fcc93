"""Taps: the features of student and teacher that are compared, and their capture.

The paper varies the location of the compared features (tables 4 and 5). Its best recipe compares
the self-attention outputs of every transformer block and the last features of DW-1 and UP-3
(`PAPER_TAPS`). Student and teacher features are paired through the block map that the student
inherited its weights by, so their shapes are always equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from koala.architectures.block_map import block_map
from koala.architectures.config import from_unet_config
from koala.distillation.settings import STAGES, Tap
from koala.errors import UserError

# Location -> module of a transformer block whose output is the feature.
_IN_TRANSFORMER = {"sa": "attn1", "ca": "attn2", "ffn": "ff"}

# Stage -> module of a U-Net with three resolutions.
_STAGE_PATHS = {
    **{f"DW-{n + 1}": f"down_blocks.{n}" for n in range(3)},
    "Mid": "mid_block",
    **{f"UP-{n + 1}": f"up_blocks.{n}" for n in range(3)},
}


def _points_in_stage(unet: nn.Module, stage: str, location: str) -> list[str]:
    path = _STAGE_PATHS[stage]
    try:
        block = unet.get_submodule(path)
    except AttributeError:  # no such stage, as KOALA-700M has no mid block
        return []
    if location == "lf":
        return [path]
    if location == "residual":
        pattern = r"resnets\.\d+"
    else:
        pattern = rf"attentions\.\d+\.transformer_blocks\.\d+\.{_IN_TRANSFORMER[location]}"
    names = (name for name, _ in block.named_modules())
    return [f"{path}.{name}" for name in names if re.fullmatch(pattern, name)]


def tap_points(unet: nn.Module, taps: Sequence[Tap]) -> list[str]:
    """Module paths in `unet` whose outputs the taps capture, in the order of taps and stages.

    unet: an SDXL-class `UNet2DConditionModel`; the meta device is fine.
    UserError for a named stage without such a feature, or a feature tapped twice.
    """
    points: list[str] = []
    for tap in taps:
        for stage in STAGES if tap.stages is None else tap.stages:
            found = _points_in_stage(unet, stage, tap.location)
            if tap.stages is not None and not found:
                raise UserError(
                    f"tap {tap.location!r} at {stage}: the student has no such feature there; "
                    "leave the stage out"
                )
            for point in found:
                if point in points:
                    raise UserError(
                        f"tap {tap.location!r} at {stage} is given twice; name each stage once"
                    )
                points.append(point)
        if tap.stages is None and not any(
            _points_in_stage(unet, stage, tap.location) for stage in STAGES
        ):
            raise UserError(f"tap {tap.location!r}: the student has no such feature; leave it out")
    return points


def paired_points(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    points: Sequence[str],
    depth_rule: str = "bottom",
) -> list[str]:
    """For each tapped module path of the student, the teacher's module it is compared with.

    The pairing is the block map of `koala compress` under `depth_rule`; a stage's last feature
    is paired with the same stage's. UserError if `student` is not a cut of `teacher`.
    """
    student_kind = from_unet_config(dict(student.config))
    teacher_kind = from_unet_config(dict(teacher.config))
    prefixes = block_map(teacher_kind, student_kind, depth_rule)

    def pair(point: str) -> str:
        if point in _STAGE_PATHS.values():
            return point
        prefix, rest = point, ""
        while prefix not in prefixes:
            assert "." in prefix, f"the block map has nothing for {point}"
            prefix, _, last = prefix.rpartition(".")
            rest = f".{last}{rest}"
        return prefixes[prefix] + rest

    pairs = [pair(point) for point in points]
    for path in pairs:
        teacher.get_submodule(path)  # AttributeError: the block map and the teacher disagree
    return pairs


class Region:
    """A transformer block or resnet: the unit of compiling and activation checkpointing.

    It replaces the `forward` of its block and changes no module, name or weight. Features tapped
    inside the block are returned as further outputs and passed to their listeners outside, so
    compiling or checkpointing `compute` neither hides a feature nor captures it twice.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._forward = type(block).forward
        self.inside: tuple[str, ...] = ()  # tapped children
        self.listeners: dict[str, list[Callable[[Tensor], None]]] = {}
        self.compute: Callable[..., tuple[Tensor, list[Tensor]]] = compute

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output, features = self.compute(self._forward, self.block, self.inside, *args, **kwargs)
        for name, feature in zip(self.inside, features, strict=True):
            for listener in self.listeners[name]:
                listener(feature)
        return output

    def listen(self, child: str, listener: Callable[[Tensor], None]) -> None:
        """Calls `listener` with the output of the block's `child` in every pass from now on."""
        if child not in self.inside:
            self.inside = (*self.inside, child)
            self.block.get_submodule(child).register_forward_hook(_keep)
        self.listeners.setdefault(child, []).append(listener)


def _keep(module: nn.Module, args: tuple, output: Tensor) -> None:
    module.tapped = output


def compute(
    forward: Callable[..., Tensor],
    block: nn.Module,
    inside: tuple[str, ...],
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The result of the block's own `forward`, and the features of its children `inside`.

    One function for all blocks, so that blocks of one shape share the compiled code.
    """
    children = [getattr(block, name) for name in inside]
    try:
        output = forward(block, *args, **kwargs)
        return output, [child.tapped for child in children]
    finally:  # also when checkpointing stops early
        for child in children:
            child.tapped = None


def regions(unet: nn.Module) -> list[Region]:
    """The regions of a U-Net in module order, created on the first call."""
    found = []
    for module in unet.modules():
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)):
            if not isinstance(module.forward, Region):
                module.forward = Region(module)  # type: ignore[method-assign]  # what it is for
            found.append(module.forward)
    return found


class Features:
    """Captures module outputs of a U-Net. Create it before the modules are wrapped.

    >>> features = Features(unet, points)
    >>> with features.capture() as captured:
    ...     unet(...)
    >>> captured  # features by point, still on the graph

    Passes outside the `with` keep nothing: neither sampling nor checkpointing's recomputation
    holds features alive.
    """

    def __init__(self, unet: nn.Module, points: Sequence[str]) -> None:
        self.points = tuple(points)
        self._into: dict[str, Tensor] | None = None
        by_block = {region.block: region for region in regions(unet)}
        for point in points:
            parent, _, child = point.rpartition(".")
            listener = self._listener(point)
            region = by_block.get(unet.get_submodule(parent))
            if region is not None:
                region.listen(child, listener)
            else:
                unet.get_submodule(point).register_forward_hook(_outside(listener))

    def _listener(self, point: str) -> Callable[[Tensor], None]:
        def listen(feature: Tensor) -> None:
            if self._into is not None:
                assert point not in self._into, "exactly one forward pass"
                self._into[point] = feature

        return listen

    @contextmanager
    def capture(self) -> Iterator[dict[str, Tensor]]:
        """For exactly one forward pass."""
        assert self._into is None
        captured = self._into = {}
        try:
            yield captured
            assert captured.keys() == set(self.points), "exactly one forward pass"
        finally:
            self._into = None


def _outside(listener: Callable[[Tensor], None]) -> Callable[..., None]:
    # A down stage returns (hidden state, skip connections); the others a tensor.
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        listener(output[0] if isinstance(output, tuple) else output)

    return hook
