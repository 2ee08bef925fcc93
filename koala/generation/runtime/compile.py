"""Faster U-Net and VAE: fused projections, compiled blocks, CUDA graphs, fixed batch sizes.

They are applied in this order, from outside the model, after every LoRA was merged: fused
projections cannot take one, and a compiled or captured model must not change.

Compiling takes a minute or two the first time, so it is never done unasked, and its results are
kept in the cache folder. Each is for one shape: batches have one of a few fixed sizes
(`koala.generation.runtime.fixed_batches`), and `koala.serving.warmup.warm_up` runs each of them
once.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koala.errors import UserError
from koala.generation.denoise import Condition, Predict
from koala.utils.asset_packages import cache_folder
from koala.utils.deferred import mark
from koala.utils.networks import Attention, BasicTransformerBlock, ResnetBlock2D

_MOST_GRAPHS = 256  # compiled variants of one kind of block: its shapes times the batch sizes
_WARM_UP = 3  # runs before a capture, in which libraries choose kernels and allocate


# --- fused projections ----------------------------------------------------------------------


@torch.no_grad()
def fuse_projections(unet: nn.Module) -> None:
    """Fuses the projections of queries, keys and values in every self-attention, and those of keys
    and values in every cross-attention, in place.

    Equal up to rounding, with as many weights as before. UserError if the projections are fused
    already or quantised, or a LoRA lies beside them.
    """
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        for attention in (block.attn1, block.attn2):
            _check_plain(attention)
    # diffusers names one class of processors for what any callable may be. An attention without
    # heads, of a pruned model, has nothing to fuse.
    for block in blocks:
        if block.attn1.heads:
            _fuse(block.attn1, ("to_q", "to_k", "to_v"))
            block.attn1.set_processor(_SelfAttention())  # type: ignore[arg-type]
        if block.attn2.heads:
            _fuse(block.attn2, ("to_k", "to_v"))
            block.attn2.set_processor(_CrossAttention())  # type: ignore[arg-type]


def _check_plain(attention: Attention) -> None:
    for name in ("to_q", "to_k", "to_v"):
        projection = getattr(attention, name, nn.Identity())
        if type(projection) is not nn.Linear or projection._forward_hooks:
            raise UserError(
                "projections that are fused, quantised or under a LoRA cannot be fused: merge the "
                "LoRA, fuse, then quantise"
            )


class _Fused(Attention):
    """What `_fuse` makes of an attention, for the type checker."""

    to_fused: nn.Linear


def _fuse(attention: Attention, names: Sequence[str]) -> None:
    parts = [getattr(attention, name) for name in names]
    weight = torch.cat([part.weight for part in parts])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    attention.to_fused = fused
    for name in names:
        delattr(attention, name)


class _SelfAttention:
    """diffusers' processor of an attention with `to_fused` = queries, keys, values."""

    def __call__(self, attention: _Fused, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = attention.to_fused(hidden_states).chunk(3, dim=-1)
        return _attended(attention, query, key, value)


class _CrossAttention:
    """The same with `to_fused` = keys, values; queries have a projection of their own."""

    def __call__(
        self,
        attention: _Fused,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        key, value = attention.to_fused(encoder_hidden_states).chunk(2, dim=-1)
        return _attended(attention, attention.to_q(hidden_states), key, value)


def _attended(attention: Attention, *projected: Tensor) -> Tensor:
    query, key, value = (
        tensor.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for tensor in projected
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


# --- compiled blocks ------------------------------------------------------------------------


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles every transformer block and resnet with `torch.compile`, in place; returns how many.

    Blocks rather than the whole model: equal blocks share their code, so that compiling time
    depends on the number of kinds, not on the depth. It happens at the first forward of each
    shape. Results are kept under $KOALA_CACHE, or in $TORCHINDUCTOR_CACHE_DIR if that is set.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    mark()
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 4 * _MOST_GRAPHS
    kinds = (BasicTransformerBlock, ResnetBlock2D)
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    return len(blocks)


# --- CUDA graphs ----------------------------------------------------------------------------


def graphed(predict: Predict, device: torch.device) -> Predict:
    """`predict` replayed from CUDA graphs, one per input shape, captured at its first call.

    At batch 1 the GPU is faster than Python launches kernels; a replay launches all of them at
    once. UserError on anything but CUDA.
    """
    if device.type != "cuda":
        raise UserError(f"CUDA graphs: the device is {device}, allowed is cuda")
    graphs: dict[tuple[torch.Size, ...], _Graph] = {}
    pool = torch.cuda.graph_pool_handle()  # shared: they run one after the other

    def replay(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        inputs = (x, timesteps, condition.text, condition.pooled, condition.time_ids)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in graphs:
            graphs[shapes] = _Graph(predict, inputs, device, pool)
        return graphs[shapes](inputs)

    return replay


class _Graph:
    """One captured evaluation, with its own input and output buffers."""

    def __init__(
        self, predict: Predict, inputs: Sequence[Tensor], device: torch.device, pool: Any
    ) -> None:
        self.inputs = [tensor.to(device, copy=True) for tensor in inputs]
        x, timesteps, *parts = self.inputs
        condition = Condition(*parts)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                predict(x, timesteps, condition)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = predict(x, timesteps, condition)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output.clone()
