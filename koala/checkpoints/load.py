"""Loads the components of a checked model folder: U-Net, VAE, text encoders, noise schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from koala.architectures.config import INNER, from_unet_config
from koala.architectures.layout import Inner, inner_widths
from koala.checkpoints.prediction import of_config
from koala.checkpoints.schema import ABOUT, checked
from koala.checkpoints.tensors import Stored, load_tensor, not_finite
from koala.checkpoints.tokenizer_file import FILE, Reader
from koala.checkpoints.validate import (
    CONFIGS,
    check_unet,
    describe_faults,
    read_json,
    read_tensors,
    refuse_quantised,
    tensor_faults,
    unet_architecture,
    variant_of,
)
from koala.errors import UserError
from koala.utils.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from koala.utils.networks import (
        AutoencoderKL,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        UNet2DConditionModel,
    )

_LEAST_ABAR = 2.0**-24  # noise level 4096
# Of a tokenizer's config: names of special tokens, and the other keys that the library writes.
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_PLAIN = ("backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class")
_OF_BPE = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
           "byte_fallback", "ignore_merges")  # fmt: skip
# Called with a layer's path and the layer as soon as its weights are read, before the next one's.
Layer = Callable[[str, "nn.Module"], object]


def load_unet(
    folder: Path, dtype: torch.dtype | None = None, layer: Layer | None = None
) -> UNet2DConditionModel:
    """The U-Net of a checked model folder, on the CPU; `dtype` None means float32."""
    import torch

    refuse_quantised(folder)
    stored = read_tensors(folder, "unet")
    check_unet(unet_architecture(folder), stored, folder)
    with without_weights():
        unet = build_unet(_settings(folder, "unet"))
    assert filled(unet, stored, dtype or torch.float32, layer)
    return unet.eval()


def build_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The U-Net of a `config.json`, with random weights; also of a pruned one.

    diffusers cannot say that modules have other widths inside: those are made anew.
    """
    from koala.utils.networks import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config({k: v for k, v in config.items() if k != INNER})
    arch = from_unet_config(config)
    if arch.inner:
        unet.register_to_config(**{INNER: dict(arch.inner)})
        possible = inner_widths(arch)
        for path, width in arch.inner:
            _narrow(unet.get_submodule(path), possible[path], width)
    return unet


def _narrow(module: Any, inner: Inner, width: int) -> None:
    """Gives a module another width inside."""
    from torch import nn

    if inner.kind == "attention":
        module.heads = width // inner.unit
        if not width:
            module.processor = _Constant()
        for name in ("to_q", "to_k", "to_v"):
            setattr(module, name, nn.Linear(getattr(module, name).in_features, width, bias=False))
        module.to_out[0] = nn.Linear(width, module.to_out[0].out_features)
    elif inner.kind == "feed-forward":
        proj = module.net[0].proj  # without a bias where it has no outputs, as in `tensor_shapes`
        module.net[0].proj = nn.Linear(proj.in_features, 2 * width, bias=width > 0)
        module.net[2] = nn.Linear(width, module.net[2].out_features)
    else:
        conv1, conv2, norm = module.conv1, module.conv2, module.norm2
        module.conv1 = nn.Conv2d(conv1.in_channels, width, 3, padding=1)
        module.time_emb_proj = nn.Linear(module.time_emb_proj.in_features, width)
        module.norm2 = nn.GroupNorm(width // inner.unit, width, norm.eps)
        module.conv2 = nn.Conv2d(width, conv2.out_channels, 3, padding=1)


class _Constant:
    """What runs an attention without heads: all it adds is a bias."""

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return attention.to_out[0].bias.to(hidden_states).expand_as(hidden_states)


def load_vae(folder: Path, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The VAE of a checked model folder, on the CPU; `dtype` None means float32."""
    import torch

    from koala.utils.networks import AutoencoderKL

    kind = dtype or torch.float32
    with without_weights():
        vae = AutoencoderKL.from_config(_settings(folder, "vae"))
    if filled(vae, read_tensors(folder, "vae"), kind):
        return vae.eval()
    # low_cpu_mem_usage needs accelerate, which is not a dependency.
    return _by_library(AutoencoderKL, folder, "vae", torch_dtype=kind, low_cpu_mem_usage=False)


def load_text(
    folder: Path, dtype: torch.dtype | None = None, layer: Layer | None = None
) -> tuple[CLIPTokenizer, CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection]:
    """(tokenizer, tokenizer_2, text_encoder, text_encoder_2) of a checked model folder.

    On the CPU; `dtype` None means float32.
    """
    import torch

    from koala.utils.networks import CLIPTextModel, CLIPTextModelWithProjection

    kind, reader = dtype or torch.float32, Reader()
    with quiet_transformers():
        return (
            _tokenizer(folder / "tokenizer", reader),
            _tokenizer(folder / "tokenizer_2", reader),
            _load_encoder(CLIPTextModel, folder, "text_encoder", kind, layer),
            _load_encoder(CLIPTextModelWithProjection, folder, "text_encoder_2", kind, layer),
        )


def stream_text(
    folder: Path,
) -> tuple[CLIPTokenizer, CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection]:
    """The same in float32; the encoders' layers are read as they run."""
    from koala.utils.networks import CLIPTextModel, CLIPTextModelWithProjection

    reader = Reader()
    return (
        _tokenizer(folder / "tokenizer", reader),
        _tokenizer(folder / "tokenizer_2", reader),
        _stream_encoder(CLIPTextModel, folder, "text_encoder"),
        _stream_encoder(CLIPTextModelWithProjection, folder, "text_encoder_2"),
    )


def _tokenizer(place: Path, reader: Reader) -> CLIPTokenizer:
    """Raises `UserError` for whatever its library cannot read."""
    from koala.utils.networks import CLIPTokenizer

    words = _settings(place.parent, place.name.replace("tokenizer", "text_encoder")).get(
        "vocab_size", 49408
    )
    try:
        found = _tokenizer_of_parts(place, reader)
        if found is None:
            found = CLIPTokenizer.from_pretrained(place, local_files_only=True)
        special = (found.bos_token_id, found.eos_token_id, found.pad_token_id)
        if len(found) > words or None in special:
            raise ValueError(f"{len(found)} tokens for {words}, special ones {special}")
        return found
    except Exception as error:  # the files are untrusted, and the library checks nothing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"{place} holds no tokenizer that can be read ({reason})") from None


def _tokenizer_of_parts(place: Path, reader: Reader) -> CLIPTokenizer | None:
    """What its library would read, in a quarter of the time, of a folder as it writes them now.

    None for other folders. The library reads a file three times, and each word of it in Python.
    """
    from koala.utils.networks import CLIPTokenizer

    config_file = CONFIGS["tokenizer"]
    if {file.name for file in place.iterdir()} != {FILE, config_file}:
        return None
    config, parts = read_json(place / config_file), reader.parts(place / FILE)
    if not config.keys() <= {*_SPECIAL, *_PLAIN} or parts is None:
        return None
    added, settings = parts.added, parts.settings
    ids = {token.content: i for i, token in added.items()}
    special = [config.get(name) for name in _SPECIAL]
    if not {*map(str, special)} <= ids.keys() or settings["truncation"] or settings["padding"]:
        return None
    config.pop("tokenizer_class", None)
    config |= {name: added[ids[str(one)]] for name, one in zip(_SPECIAL, special, strict=True)}
    config |= {"name_or_path": str(place), "is_local": True, "local_files_only": True}
    bare = CLIPTokenizer(
        vocab=ids, merges=[], added_tokens_decoder=added,
        post_processor=parts.tokenizer().post_processor, **config,
    )  # fmt: skip
    backend = bare.backend_tokenizer
    if any(getattr(backend.model, key) != getattr(parts.model, key, None) for key in _OF_BPE):
        return None
    backend.model = parts.model
    return bare


def _settings(folder: Path, component: str) -> dict[str, Any]:
    """What a component's config says of its network. Raises `UserError`."""
    path = f"{component}/config.json"
    found = checked(path, read_json(folder / path), str(folder / path))
    return {key: found[key] for key in found if key not in ABOUT and not key.startswith("_")}


def _load_encoder(
    model_class: Any, folder: Path, component: str, dtype: torch.dtype, layer: Layer | None
) -> Any:
    from koala.utils.networks import CLIPTextConfig

    with without_weights():
        encoder = model_class(CLIPTextConfig(**_settings(folder, component)))
    if not filled(encoder, read_tensors(folder, component), dtype, layer):
        encoder = _by_library(model_class, folder, component, dtype=dtype)
        if layer is not None:
            for path, module in encoder.named_modules():
                layer(path, module)
    return encoder.eval()


def _stream_encoder(model_class: Any, folder: Path, component: str) -> Any:
    from koala.checkpoints.streamed import StoredWeights, stream
    from koala.utils.networks import CLIPTextConfig

    with without_weights():
        encoder = model_class(CLIPTextConfig(**_settings(folder, component)))
    # Some versions of transformers have this before every name, in files and models.
    prefix, stored = "text_model.", read_tensors(folder, component)
    bare = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    own = {name: bare[name.removeprefix(prefix)] for name in wanted
           if name.removeprefix(prefix) in bare}  # fmt: skip
    if faults := tensor_faults(wanted, {name: tensor.shape for name, tensor in own.items()}):
        raise UserError(f"{folder}/{component}: the weights do not fit config.json: {faults}")
    stream(encoder, StoredWeights(own))
    return encoder.eval()


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Models that are made inside the block hold no memory, and nothing is initialised.

    But positions are real: no file has them.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutInit(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
            if func is torch.arange:
                kwargs = {**(kwargs or {}), "device": "cpu"}
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), WithoutInit():
        yield


def filled(
    model: nn.Module,
    stored: Mapping[str, Stored],
    dtype: torch.dtype,
    layer: Layer | None = None,
) -> bool:
    """Puts stored weights into a model on the meta device; False if their names or shapes differ.

    Layer by layer, without the initialisation that a library's own loader does first.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in stored.items()}:
        return False
    by_layer: dict[str, dict[str, str]] = {}
    for name in stored:
        path, _, key = name.rpartition(".")
        by_layer.setdefault(path, {})[key] = name
    for path, module in model.named_modules():
        names = by_layer.get(path, {})
        # A copy, so that torch owns the memory and aligns it.
        own = {key: load_tensor(stored[name]).to(dtype, copy=True) for key, name in names.items()}
        _check_finite({names[key]: tensor for key, tensor in own.items()}, stored)
        if own:
            module.load_state_dict(own, strict=False, assign=True)
        if layer is not None:
            layer(path, module)
    return True


def _by_library(model_class: Any, folder: Path, component: str, **options: Any) -> Any:
    """A component by its library's loader, which knows the names that older files have.

    `UserError` unless its weights fit its config.
    """
    stored = read_tensors(folder, component)
    if (folder / component / "adapter_config.json").exists():  # the library would apply it
        raise UserError(
            f"{folder}/{component} has an adapter_config.json beside older weights: remove it, or "
            "give the adapter with --lora"
        )
    model, info = model_class.from_pretrained(
        folder / component,
        **options,
        variant=variant_of(folder / component, component),
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    misshapen = (entry[0] for entry in info["mismatched_keys"])
    keys = (info["missing_keys"], info["unexpected_keys"], misshapen)
    if faults := describe_faults(*map(sorted, keys)):
        raise UserError(f"{folder}/{component}: the weights do not fit config.json: {faults}")
    _check_finite(model.state_dict(), stored)
    return model.eval()


def _check_finite(weights: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Raises `UserError` naming the first weight that holds NaN or infinity."""
    for name, weight in weights.items():
        # The largest value tells: ten times faster than testing every element.
        if weight.is_floating_point() and weight.numel() and not weight.abs().max().isfinite():
            raise not_finite(stored.get(name, next(iter(stored.values()))), name)


def load_scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler config, as diffusers writes it."""
    return read_json(folder / "scheduler" / "scheduler_config.json")


def zeros_for_empty(folder: Path) -> bool:
    """Whether the model takes zeros, not the embedding of "", for no negative prompt."""
    found: bool = read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)
    return found


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """`noise_levels` as a tensor, bit for bit as diffusers computes it."""
    import torch

    return torch.from_numpy(noise_levels(config))


def noise_levels(config: Mapping[str, Any]) -> np.ndarray:
    """abar_t = prod (1 - beta_s) of a scheduler config, float32 [levels], for every timestep t.

    Ho et al. 2020, equation 4, with the scaled-linear betas of Rombach et al. 2022. For zero
    terminal SNR, sqrt(abar) is shifted and scaled so that it ends at 0 (arXiv 2305.08891,
    algorithm 1); the last is then 2**-24, so that its noise level is finite, as in diffusers.

    Computed without PyTorch, in its order and precision: `torch.linspace` counts from the nearer
    end.
    """
    count: int = config["num_train_timesteps"]
    first, last = (np.float32(config[key] ** 0.5) for key in ("beta_start", "beta_end"))
    step, i = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
    roots = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
    alphas = np.float32(1) - roots.astype(np.float32) ** 2
    abar = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
    if not of_config(config).zero_snr:
        return abar
    root = np.sqrt(abar)
    rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    rescaled[-1] = _LEAST_ABAR
    return rescaled
