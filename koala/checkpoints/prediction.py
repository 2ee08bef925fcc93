"""What a U-Net predicts and the noise it was trained on: read and written in this one place.

Files say it in four ways: empty marker tensors (`v_pred`, `ztsnr`, `edm_vpred.*`), metadata
(`modelspec.prediction_type` and kohya's `ss_*`), and the class and the settings of a scheduler.
Models of another kind of schedule are refused by name. How a scheduler spaces its steps is no
property of the model and is left alone. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from koala.errors import UserError

EPSILON, VELOCITY = "epsilon", "v_prediction"  # diffusers' names
_VELOCITY_MARK, _ZERO_SNR_MARK = "v_pred", "ztsnr"  # names of empty tensors
_SPEC = "modelspec.prediction_type"
_SPELLINGS = {  # of metadata and configs, in lower case and without separators
    "epsilon": EPSILON, "eps": EPSILON, "noise": EPSILON,
    "v": VELOCITY, "vpred": VELOCITY, "vprediction": VELOCITY, "velocity": VELOCITY,
}  # fmt: skip
_TRUE = ("true", "1")
_BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
_EDM = "an EDM model, which has continuous noise levels (Playground v2.5 and CosXL are such)"
_FLOW = "a flow-matching model"
_NEEDED = "koala works with discrete schedules that predict epsilon or v, as SDXL's"


@dataclass(frozen=True)
class Prediction:
    """What a U-Net predicts: `EPSILON` or `VELOCITY`; and whether its last level is pure noise.

    Zero terminal SNR rescales the betas (arXiv 2305.08891, algorithm 1).
    """

    type: str = EPSILON
    zero_snr: bool = False

    def __str__(self) -> str:
        rescaled = ", zero terminal SNR" if self.zero_snr else ""
        return f"{'v' if self.type == VELOCITY else self.type}{rescaled}"

    @property
    def config(self) -> dict[str, Any]:
        """Its settings of a diffusers scheduler."""
        return {"prediction_type": self.type, "rescale_betas_zero_snr": self.zero_snr}

    @property
    def marks(self) -> tuple[str, ...]:
        """The empty tensors by which other programs know it in a single file."""
        marks = {_VELOCITY_MARK: self.type == VELOCITY, _ZERO_SNR_MARK: self.zero_snr}
        return tuple(name for name, stated in marks.items() if stated)

    @property
    def metadata(self) -> dict[str, str]:
        """The entry of a single file's metadata, as the ModelSpec standard spells it."""
        return {_SPEC: "v" if self.type == VELOCITY else "epsilon"}


def of_config(config: Mapping[str, Any]) -> Prediction:
    """What a scheduler's config states. Raises `UserError` for a schedule that is not SDXL's kind.

    Nothing is assumed that decides the noise levels: a config without betas is refused, since
    diffusers would fill in those of another model.
    """
    name, stated = str(config.get("_class_name", "")), config.get("prediction_type", EPSILON)
    if "FlowMatch" in name or config.get("use_flow_sigmas") or "flow" in str(stated).lower():
        raise UserError(_refusal("scheduler", _FLOW))
    continuous = config.get("timestep_type") == "continuous"
    if name.startswith("EDM") or config.get("sigma_data") is not None or continuous:
        raise UserError(_refusal("scheduler", _EDM))
    if missing := [key for key in _BETAS if config.get(key) is None]:
        raise UserError(
            f"the scheduler config lacks {', '.join(missing)}: without them the noise levels are "
            "unknown; take scheduler_config.json of the model that this one was made from"
        )
    for key, wanted in (("beta_schedule", "scaled_linear"), ("trained_betas", None)):
        if config.get(key) != wanted:
            raise UserError(
                f"the scheduler config has {key} = {config[key]!r}, koala needs {wanted!r}: use a "
                "model trained on SDXL's schedule"
            )
    return Prediction(
        _spelled(stated, "the scheduler config"), bool(config.get("rescale_betas_zero_snr", False))
    )


def of_file(names: Collection[str], metadata: Mapping[str, str]) -> Prediction | None:
    """What a weights file states by its tensors' names, else by its metadata; None if nothing.

    The tensors win: programs that merge or edit a model keep its metadata as it was. Raises
    `UserError` for a model of another kind.
    """
    if any(name in ("edm_mean", "edm_std") or name.startswith("edm_vpred.") for name in names):
        raise UserError(_refusal("file", _EDM))
    spec, trained = metadata.get(_SPEC, ""), _flag(metadata, "ss_v_parameterization")
    if "flow" in spec.lower():
        raise UserError(_refusal("file", _FLOW))
    if "edm" in spec.lower():
        raise UserError(_refusal("file", _EDM))
    type, rescaled = None, _ZERO_SNR_MARK in names or _flag(metadata, "ss_zero_terminal_snr")
    if _VELOCITY_MARK in names:
        type = VELOCITY
    elif spec:
        type = _spelled(spec, f"its metadata ({_SPEC})")
    elif trained is not None:
        type = VELOCITY if trained else EPSILON
    return None if type is None and not rescaled else Prediction(type or EPSILON, bool(rescaled))


def is_mark(name: str) -> bool:
    """Whether a tensor of that name only states what the model predicts."""
    return name in (_VELOCITY_MARK, _ZERO_SNR_MARK)


def _flag(metadata: Mapping[str, str], key: str) -> bool | None:
    return metadata[key].lower() in _TRUE if key in metadata else None


def _spelled(stated: object, where: str) -> str:
    word = str(stated).lower().replace("_", "").replace("-", "").replace(" ", "")
    if word not in _SPELLINGS:
        raise UserError(f"{where} says that the U-Net predicts {stated!r}: {_NEEDED}")
    return _SPELLINGS[word]


def _refusal(what: str, kind: str) -> str:
    return f"the {what} is that of {kind}: {_NEEDED}"
