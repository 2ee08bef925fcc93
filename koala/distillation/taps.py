"""Taps: which features of student and teacher are compared, and how they are captured.

The paper varies the location of the compared feature (table 4 and 5): the outputs of
self-attention in every transformer block, with the last features of DW-1 and UP-3, are its best
recipe (`PAPER_TAPS`). Student and teacher features are paired through the same block map that
gave the student its weights, so the two always have equal shapes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from koala.architectures import from_unet_config
from koala.compression import block_map
from koala.errors import UserError

# Location -> the module inside a transformer block, whose output is the feature.
_IN_TRANSFORMER = {"sa": "attn1", "ca": "attn2", "ffn": "ff"}
LOCATIONS = (*_IN_TRANSFORMER, "residual", "lf")

# Stage -> the module of a U-Net with three resolutions.
_STAGE_PATHS = {
    "DW-1": "down_blocks.0",
    "DW-2": "down_blocks.1",
    "DW-3": "down_blocks.2",
    "Mid": "mid_block",
    "UP-1": "up_blocks.0",
    "UP-2": "up_blocks.1",
    "UP-3": "up_blocks.2",
}
STAGES = tuple(_STAGE_PATHS)


@dataclass(frozen=True)
class Tap:
    """A kind of feature to compare.

    location: "sa", "ca", "ffn": output of self-attention, cross-attention, feed-forward net of
      each transformer block, [n, tokens, width], before it is added to the residual stream.
      "residual": output of each resnet, [n, c, h, w].
      "lf": last feature, the hidden state that a stage hands to the next one, [n, c, h, w]:
      after the down- or upsampler where the stage has one.
    stages: names out of `STAGES`; None means every stage that has such a feature.
    """

    location: str
    stages: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.location not in LOCATIONS:
            raise UserError(f"tap location {self.location!r}: choose from {', '.join(LOCATIONS)}")
        if self.stages is None:
            return
        if isinstance(self.stages, str) or not self.stages:
            raise UserError(f"tap stages {self.stages!r}: give a tuple out of {', '.join(STAGES)}")
        for stage in self.stages:
            if stage not in STAGES:
                raise UserError(f"tap stage {stage!r}: choose from {', '.join(STAGES)}")


# The paper's best recipe: 30 SA + 2 LF taps in KOALA-1B, 21 + 2 in KOALA-700M.
PAPER_TAPS = (Tap("sa"), Tap("lf", ("DW-1", "UP-3")))


def _points_in_stage(unet: nn.Module, stage: str, location: str) -> list[str]:
    path = _STAGE_PATHS[stage]
    try:
        block = unet.get_submodule(path)
    except AttributeError:  # the model has no such stage, as KOALA-700M has no mid block
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

    unet: a `UNet2DConditionModel` of SDXL's kind; on the meta device too.
    UserError: a named stage without such a feature, or a feature that two taps ask for.
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
    is paired with the same stage's. UserError where `student` is no cut of `teacher`.
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


class Features:
    """Collects module outputs during one forward pass.

    >>> with Features(unet, points) as features:
    ...     unet(...)
    >>> features.values  # one tensor a point, in the order of `points`

    The hooks sit on the raw modules, so a wrapper around `unet` makes no difference, and they
    are there only inside the `with`: no feature is kept alive by sampling or by evaluation.
    """

    def __init__(self, unet: nn.Module, points: Sequence[str]) -> None:
        self._modules = [unet.get_submodule(point) for point in points]
        self._captured: list[list[Tensor]] = [[] for _ in points]
        self._handles: list = []

    def __enter__(self) -> Features:
        def hook_for(slot: list[Tensor]):
            # A down stage returns (hidden state, skip connections); the others a tensor.
            def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
                slot.append(output[0] if isinstance(output, tuple) else output)

            return hook

        for module, slot in zip(self._modules, self._captured, strict=True):
            self._handles.append(module.register_forward_hook(hook_for(slot)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def values(self) -> list[Tensor]:
        """The features of the one forward pass made inside the `with`, still on the graph."""
        assert all(len(slot) == 1 for slot in self._captured), "exactly one forward pass"
        return [slot[0] for slot in self._captured]
