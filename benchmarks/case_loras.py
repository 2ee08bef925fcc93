"""Toy LoRAs of the kinds that public bug reports name, and what is taken for one.

`LORAS` says how each is made of a `Loras`, by its name; `METADATA` what two say of themselves.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from koala.checkpoints import ldm_keys
from koala.lora.names import BaseModel, Target, base_named, base_of, shapes, spellings
from toy_lora import toy_lora

Tensors = dict[str, torch.Tensor]
NONE = torch.zeros(0)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


class Loras:
    """Random LoRAs for the toy SDXL in `folder`."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.base, self._file = base_of(folder), place / "made.safetensors"
        self.names = spellings(self.base)["kohya, original names"]

    def of(
        self, form: str = "kohya", select: Callable[[Target], bool] | None = None,
        base: BaseModel | None = None, **options: Any,
    ) -> Tensors:  # fmt: skip
        """In one of the forms of `tests/toy_lora.py`; by default on the toy's attention alone."""
        given = {"alpha": 2.0, **options} if form.startswith("kohya") else options
        chosen = select or _attention
        return load_file(toy_lora(self._file, base or self.base, form, chosen, **given))

    def factors(self, make: Callable[[tuple[int, ...]], Tensors]) -> Tensors:
        """What `make` gives for a weight's shape, for each attention, and its alpha."""
        found = {}
        for target, shape in shapes(self.base).items():
            if _attention(target):
                stem = self.names[target]
                found |= {f"{stem}.{role}": x for role, x in make(shape).items()}
                found[f"{stem}.alpha"] = torch.tensor(2.0)
        return found

    def dotted(self, prefix: str) -> Tensors:
        """With the original names, dots kept."""
        paths = ldm_keys.unet_modules(self.base.unet)
        return {
            prefix + paths[target.path] + ending: x
            for target, shape in shapes(self.base).items()
            if _attention(target)
            for ending, x in ((".lora_down.weight", torch.randn(2, shape[1])),
                              (".lora_up.weight", 0.01 * torch.randn(shape[0], 2)))
        }  # fmt: skip


def _attention(target: Target) -> bool:
    return target.part == "unet" and ".attn" in target.path


def _loha(shape: tuple[int, ...]) -> Tensors:
    return {f"hada_w{n}_{end}": 0.2 * torch.randn(*(s[:: 1 if end == "a" else -1]))
            for n in (1, 2) for end, s in (("a", (shape[0], 2)), ("b", (shape[1], 2)))}  # fmt: skip


def _lokr(shape: tuple[int, ...]) -> Tensors:
    return {
        "lokr_w1": 0.2 * torch.randn(4, 4),
        "lokr_w2": 0.2 * torch.randn(shape[0] // 4, shape[1] // 4),
    }


def _dora(tensors: Tensors) -> Tensors:
    norms = {
        f"{n.removesuffix('.lora_up.weight')}.dora_scale": torch.ones(x.shape[0], 1)
        for n, x in tensors.items()
        if n.endswith(".lora_up.weight")
    }
    return tensors | norms


def _b_lora(target: Target) -> bool:
    places = ("up_blocks.0.attentions.0.", "up_blocks.0.attentions.1.")
    return _attention(target) and target.path.startswith(places)


def _endings(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    for old, new in pairs:
        tensors = {name.replace(old, new): x for name, x in tensors.items()}
    return tensors


def _part(*parts: str) -> Callable[[Target], bool]:
    return lambda target: target.part in parts


def _where(part: str, tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """The tensors, changed where their name has `part`."""
    return {name: change(x) if part in name else x for name, x in tensors.items()}


LORAS: dict[str, Callable[[Loras], Tensors]] = {
    "kohya": lambda m: m.of(),
    "bundle_emb": lambda m: m.of() | {
        "bundle_emb.mytok.clip_l": torch.randn(2, 16),
        "bundle_emb.mytok.clip_g": torch.randn(2, 24)},
    "stray names": lambda m: m.of() | {
        "diffusion_model_output_blocks_9_0.lora_down.weight": torch.randn(2, 9),
        "diffusion_model_output_blocks_9_0.lora_up.weight": torch.randn(9, 2)},
    "an orphan alpha": lambda m: m.of() | {
        "lora_unet_input_blocks_9_9_nothing.alpha": torch.tensor(1.0)},
    "training state": lambda m: m.of() | {"global_step": torch.tensor(5)},
    "norms and biases": lambda m: m.of() | {
        "lora_unet_out_0.w_norm": torch.zeros(16), "lora_unet_out_0.b_norm": torch.zeros(16),
        "lora_unet_out_2.diff_b": torch.zeros(4)},
    "OneTrainer's dots": lambda m: m.dotted("unet."),
    "ComfyUI's saver": lambda m: m.dotted("diffusion_model."),
    "PEFT, an adapter's name": lambda m: _endings(
        m.of("PEFT"), ("lora_A.", "lora_A.my_style."), ("lora_B.", "lora_B.my_style.")),
    "PEFT's own": lambda m: m.of("PEFT alone"),
    "LyCORIS alone": lambda m: _endings(m.of("kohya of diffusers"), ("lora_unet_", "lycoris_")),
    "text projection": lambda m: m.of(
        select=lambda t: t == Target("text_encoder_2", "text_projection")),
    "text encoders alone": lambda m: m.of(select=_part("text_encoder", "text_encoder_2")),
    "processor names": lambda m: m.of("old diffusers"),
    "SimpleTuner's": lambda m: _endings(
        m.of(), (".lora_down.", ".lora_A."), (".lora_up.", ".lora_B.")),
    "time and label": lambda m: m.of(
        select=lambda t: t.part == "unet" and "embedding" in t.path),
    "a slider": lambda m: m.of(
        select=lambda t: _attention(t) and "attn1" in t.path, rank=1, alpha=1.0),
    "DoRA": lambda m: _dora(m.of()),
    "DoRA of PEFT": lambda m: (p := m.of("PEFT")) | {
        n.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(x.shape[0])
        for n, x in p.items() if "lora_B" in n},
    "LoHa": lambda m: m.factors(_loha),
    "LoKr": lambda m: m.factors(_lokr),
    "LoHa with DoRA": lambda m: m.factors(
        lambda s: _loha(s) | {"dora_scale": torch.ones(s[0], 1)}),
    "whole differences": lambda m: m.factors(lambda s: {"diff": 0.1 * torch.randn(*s)}),
    "OFT": lambda m: m.factors(lambda s: {"oft_blocks": torch.randn(2, 4, 4)}),
    "GLoRA": lambda m: m.factors(
        lambda s: {f"{x}{n}.weight": torch.randn(2, 2) for x in "ab" for n in (1, 2)}),
    "Control-LoRA": lambda m: {
        "lora_controlnet": NONE, "input_hint_block.0.weight": torch.randn(4, 3, 3, 3),
        "input_blocks.1.0.in_layers.2.up": torch.randn(16, 2)},
    "ControlNet-LLLite": lambda m: {
        "lllite_unet_input_blocks_4_1_attn1_to_k.up.0.weight": torch.randn(2, 2)},
    "T2I-Adapter": lambda m: {"adapter.body.0.resnets.0.block1.weight": torch.randn(2, 2)},
    "IP-Adapter FaceID": lambda m: {
        "image_proj.proj.0.weight": torch.randn(2, 2),
        "ip_adapter.0.to_q_lora.down.weight": torch.randn(2, 2),
        "ip_adapter.1.to_k_ip.weight": torch.randn(2, 2)},
    "hypernetwork": lambda m: {"768.0.linear.0.weight": torch.randn(2, 2)},
    "of Flux": lambda m: {
        f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{x}.weight": torch.randn(2, 2)
        for x in "AB"},
    "IA3": lambda m: m.factors(
        lambda s: {"weight": torch.randn(s[0], 1), "on_input": torch.tensor(False)}),
    "of SDXL": lambda m: m.of(base=base_named("sdxl"), rank=1),
    "B-LoRA": lambda m: m.of(base=base_named("sdxl"), select=_b_lora, rank=1),
    "B-LoRA, as PEFT": lambda m: m.of("PEFT", base=base_named("sdxl"), select=_b_lora, rank=1),
    "textual inversion": lambda m: {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)},
    "textual inversion of SD 1.5": lambda m: {"emb_params": torch.randn(2, 16)},
    "textual inversion of diffusers": lambda m: {"<tok>": torch.randn(16)},
    "bf16 alpha": lambda m: _where(".alpha", m.of(), torch.Tensor.bfloat16),
    "alpha as a vector": lambda m: _where(".alpha", m.of(), lambda x: x.reshape(1)),
    "no alpha": lambda m: m.of(alpha=None),
    "PEFT's settings": lambda m: m.of("PEFT"),
    "rslora": lambda m: m.of("PEFT"),
    "fp8": lambda m: {n: x.to(torch.float8_e4m3fn) if x.ndim > 1 else x for n, x in m.of().items()},
    "alpha nan": lambda m: _where(".alpha", m.of(), lambda x: x * float("nan")),
    "NaN": lambda m: _where("attn1_to_q.lora_up", m.of(), with_nan),
    "infinite": lambda m: _where("lora_up", m.of(), lambda x: x * 1e38 * 1e3),
    "huge": lambda m: _where("lora_up", m.of(), lambda x: x * 1e30),
    "rank 0": lambda m: _where(
        "up", _where("down", m.of(select=_b_lora), lambda x: x[:0]), lambda x: x[:, :0]),
    "SD 1.5": lambda m: _endings(m.of(select=_part("text_encoder")), ("lora_te1_", "lora_te_")),
    "empty": lambda m: {},
}  # fmt: skip
_PEFT = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}
METADATA = {
    "PEFT's settings": {"lora_adapter_metadata": json.dumps(_PEFT)},
    "rslora": {"lora_adapter_metadata": json.dumps(_PEFT | {"unet.use_rslora": True})},
}
