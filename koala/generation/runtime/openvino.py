"""U-Net and VAE on a CPU through OpenVINO, built from their weights (`openvino_graph`).

OpenVINO packs the weights once for the CPU it runs on; PyTorch does so at every step, which costs
a small model most. The cache folder keeps the converted model, and what was compiled of it for
each shape. Fixed shapes are a third faster than dynamic ones.

Needs the extra `openvino`. Numbers agree with PyTorch's within 1e-4 in fp32; bf16 and int8 are
approximations, whose cost `python -m benchmarks.fidelity` measures.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from koala.checkpoints.latent_scale import LatentScale
from koala.errors import UserError
from koala.generation.decode import Autoencoder
from koala.generation.denoise import Condition, Predict
from koala.generation.pixels import Decode, finished
from koala.generation.quantise import Quantised
from koala.generation.runtime.compiled import Compiled, core, openvino_folder
from koala.generation.runtime.openvino_graph import (
    decoder_model,
    is_tiny,
    tiny_decoder_model,
    unet_model,
    unsupported,
    unsupported_decoder,
)
from koala.utils.digest import digest
from koala.utils.extras import require
from koala.utils.networks import ConfigMixin, UNet2DConditionModel

PRECISIONS = ("fp32", "bf16", "int8")
_BUILT = 2  # counts changes of what `openvino_graph` builds: others' files are not taken for it

# (x, timesteps, condition), the arguments of a `Predict`.
UNetInputs: TypeAlias = tuple[Tensor, Tensor, Condition]


@dataclass(frozen=True)
class Calibration:
    """Inputs of a U-Net to quantise by, made only if the quantised model is not in the cache."""

    name: str  # equal names must mean equal samples
    made: Callable[[], Sequence[UNetInputs]]


def predictor(
    unet: UNet2DConditionModel,
    precision: str = "fp32",
    samples: Sequence[UNetInputs] | Calibration = (),
) -> Predict:
    """A U-Net, float32 on the CPU, run by OpenVINO.

    precision: "fp32"; "bf16", if the CPU has it; or "int8", which quantises weights and
    activations with NNCF by `samples` of the U-Net's inputs (`recorded` collects them). UserError
    for a missing package, a setting that is not built, or a LoRA beside the weights: it must be
    merged.
    """
    engine = unet_engine(unet, precision, samples)

    def predict(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return engine(*_inputs(x, timesteps, condition))

    return predict


def unet_engine(
    unet: UNet2DConditionModel,
    precision: str,
    samples: Sequence[UNetInputs] | Calibration = (),
) -> "Engine":
    """What `predictor` runs; UserError as there."""
    _check(precision, samples)
    refuse_hooks(unet)
    if not isinstance(samples, Calibration):
        samples = Calibration(_hash(_flat(samples)), partial(list, samples))
    _refuse_unsupported(unsupported(unet.config))
    return Engine(unet, unet_model, precision, samples)


def decoder(vae: Autoencoder, precision: str = "fp32") -> Decode:
    """The decoder of a VAE or a tiny one run by OpenVINO, all images at once; "fp32" or "bf16"."""
    engine, factor = decoder_engine(vae, precision), LatentScale(vae.config).factor

    def decode(latents: Tensor) -> Tensor:
        return finished(engine(latents / factor), latents)

    return decode


def decoder_engine(vae: Autoencoder, precision: str) -> "Engine":
    """What `decoder` runs."""
    if precision == "int8":
        raise UserError("precision 'int8' is for the U-Net: the VAE takes fp32 or bf16")
    _check(precision, ())
    _refuse_unsupported(unsupported_decoder(vae.config))
    return Engine(vae, tiny_decoder_model if is_tiny(vae.config) else decoder_model, precision)


def is_converted(unet: UNet2DConditionModel) -> bool:
    """Whether the cache has this U-Net, with these weights, as an OpenVINO model in floats."""
    return Engine(unet, unet_model).place.is_file()


def recorded(predict: Predict, into: list[UNetInputs]) -> Predict:
    """`predict`, which also appends its inputs to `into`."""

    def keep(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        into.append((x.cpu(), timesteps.cpu(), condition.to(torch.device("cpu"), torch.float32)))
        return predict(x, timesteps, condition)

    return keep


# --- from PyTorch to a compiled model -------------------------------------------------------


class Engine:
    """One model in one precision, compiled for each shape of its inputs.

    build: makes the `openvino.Model` of a config and its tensors.
    """

    def __init__(
        self,
        model: UNet2DConditionModel | Autoencoder,
        build: Callable[[Any, Any], Any],
        precision: str = "fp32",
        samples: Calibration | None = None,
    ) -> None:
        import openvino

        self.ov = openvino
        self.model, self.build = model, build
        self.precision, self.samples = precision, samples
        if precision == "bf16" and "BF16" not in core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise UserError("precision 'bf16': this CPU has no bfloat16; choose fp32 or int8")
        # By the weights' values, so that a merged LoRA makes another model.
        kind = f"int8 {samples.name}" if precision == "int8" and samples else "float"
        self.key = _fingerprint(model, f"{build.__name__} {_BUILT} {kind}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.from_numpy(self._compiled(*map(_array, inputs))[0])

    @cached_property
    def _compiled(self) -> Compiled:
        return Compiled(self.file, self.precision == "bf16", torch.get_num_threads())

    @property
    def place(self) -> Path:
        """Where the cache keeps the OpenVINO model, or would."""
        return openvino_folder() / f"{digest([self.key, self.ov.__version__])}.xml"

    @cached_property
    def file(self) -> Path:
        """The model as an OpenVINO model, quantised if asked for; kept on disk."""
        file = self.place
        if not (file.is_file() and file.with_suffix(".bin").is_file()):
            model = self.build(self.model.config, weights_of(self.model))
            if self.precision == "int8" and self.samples is not None:
                model = _quantised(model, _flat(self.samples.made()))
            save_model(model, file)
        return file


def weights_of(model: nn.Module) -> dict[str, Tensor | Quantised]:
    """A network's tensors by name; a quantised layer stands for its weight."""
    layers = {path: one for path, one in model.named_modules() if isinstance(one, Quantised)}
    plain = {name: tensor for name, tensor in model.state_dict().items()
             if name.rpartition(".")[0] not in layers or name.endswith(".bias")}  # fmt: skip
    return {**plain, **{f"{path}.weight": one for path, one in layers.items()}}


def save_model(model: Any, file: Path, half: bool = False) -> None:
    """Writes the model's xml and bin, its weights in fp16 if `half`, whole or not at all."""
    import openvino

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"part-{os.getpid()}-{file.name}")
    openvino.save_model(model, part, compress_to_fp16=half)
    os.replace(part.with_suffix(".bin"), file.with_suffix(".bin"))
    os.replace(part, file)  # last: if it exists, both do


def _quantised(model: Any, samples: Sequence[tuple[Tensor, ...]]) -> Any:
    """The model with 8-bit weights and activations, by NNCF's post-training quantisation."""
    import nncf

    def arrays(sample: tuple[Tensor, ...]) -> dict[int, np.ndarray]:
        return {i: _array(tensor) for i, tensor in enumerate(sample)}

    return nncf.quantize(
        model,
        nncf.Dataset(samples, arrays),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
    )


# --- checks, names, cache -------------------------------------------------------------------


def _check(precision: str, samples: Sequence[UNetInputs] | Calibration) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: OpenVINO takes {', '.join(PRECISIONS)}")
    needed = ("openvino", "nncf") if precision == "int8" else ("openvino",)
    require(f"precision {precision}", "openvino", *needed)
    assert bool(samples) == (precision == "int8"), "int8, and only int8, needs samples"


def refuse_hooks(unet: nn.Module) -> None:
    """UserError for a LoRA beside the weights, which a copy of the weights would not have."""
    if any(module._forward_hooks for module in unet.modules()):
        raise UserError(
            "a LoRA lies beside the weights, where this backend does not see it: merge it, as "
            "koala.load(lora=..., backend=...) does"
        )


def _refuse_unsupported(reason: str | None) -> None:
    if reason:
        raise UserError(f"OpenVINO cannot run this model: {reason}")


def _fingerprint(model: UNet2DConditionModel | Autoencoder, kind: str) -> str:
    """A hash of a model's weights and configuration, and of `kind`."""
    weights = _hash([tuple(tensor for _, tensor in sorted(model.state_dict().items()))])
    return digest([json.dumps(settings_of(model), sort_keys=True), weights, kind])


def _hash(samples: Iterable[tuple[Tensor, ...]]) -> str:
    state = hashlib.sha256()
    for tensor in chain.from_iterable(samples):
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _flat(samples: Iterable[UNetInputs]) -> list[tuple[Tensor, ...]]:
    return [_inputs(*sample) for sample in samples]


def _inputs(x: Tensor, timesteps: Tensor, condition: Condition) -> tuple[Tensor, ...]:
    """What `unet_model` takes, in its order."""
    return x, timesteps.long(), condition.text, condition.pooled, condition.time_ids


def _array(tensor: Tensor) -> np.ndarray:
    """On the CPU, in the dtype that the models take."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


def settings_of(model: ConfigMixin) -> dict[str, Any]:
    """A model's configuration without private keys, such as the folder it was read from."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}
