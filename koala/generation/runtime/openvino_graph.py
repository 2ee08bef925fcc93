"""SDXL's U-Net and the VAE's decoder, or a tiny one, as OpenVINO models, layer by layer.

OpenVINO can trace a PyTorch module itself; for a U-Net of 5 million parameters that takes seconds,
for one of 800 million over 13 GB. Here the weights are used where they lie, and which layers there
are is read from their names, those of diffusers.

Letters: n rows, c channels, h and w height and width, s = h * w positions, d width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koala.architectures.config import from_unet_config
from koala.checkpoints.flat import FlatDecoder, FlatUNet
from koala.checkpoints.latent_scale import LatentScale
from koala.errors import UserError
from koala.generation.quantise import Quantised

_LAYER_NORM, _TRANSFORMER_NORM, _VAE_NORM = 1e-5, 1e-6, 1e-6  # epsilons that no config names
# Settings of diffusers' classes that change what is computed, with the values that are built here.
_UNET: dict[str, Any] = {
    "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "time_embedding_type": "positional",
    "timestep_post_act": None, "time_embedding_act_fn": None, "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "cross_attention_norm": None, "upcast_attention": False,
}  # fmt: skip
_VAE: dict[str, Any] = {"act_fn": "silu"}
_TINY: dict[str, Any] = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
_TINY_MAGNITUDE = 3.0  # to which `AutoencoderTiny` bounds the latents


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Which setting of a U-Net's config is not built here; None if all are."""
    if reason := _differing(config, _UNET):
        return reason
    try:
        from_unet_config(config)
    except UserError as error:
        return str(error)
    return None


def unsupported_decoder(config: Mapping[str, Any]) -> str | None:
    """The same of a VAE, or a tiny autoencoder."""
    if is_tiny(config):
        return _differing(config, _TINY)
    if reason := _differing(config, _VAE):
        return reason
    strange = {*config["up_block_types"]} - {"UpDecoderBlock2D"}
    return f"it takes no VAE with {min(strange)}" if strange else None


def is_tiny(config: Mapping[str, Any]) -> bool:
    """Whether an autoencoder's config is an `AutoencoderTiny`'s."""
    return "num_decoder_blocks" in config


def _differing(config: Mapping[str, Any], built: Mapping[str, Any]) -> str | None:
    for key, value in built.items():
        if config.get(key, value) != value:
            return f"it takes models whose {key} is {value!r}, this one's is {config[key]!r}"
    return None


def unet_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor | Quantised]) -> Any:
    """A U-Net as an `openvino.Model` of dynamic shapes, float32; layers in 4 or 8 bits stay so.

    Inputs, in float32 but for the timesteps, which are whole numbers: x [n, c, h, w], timesteps [n]
    or [1], text [n, t, d], pooled [n, p], time ids [n, 6]. Output: epsilon or v [n, c, h, w]. They
    are named as OpenVINO GenAI expects. The model uses the tensors' memory.
    """
    import openvino

    layers, arch = _Layers(tensors), from_unet_config(config)
    ops = layers.ops
    x, t = ops.parameter([-1, config["in_channels"], -1, -1]), ops.parameter([-1], np.int64)
    text = ops.parameter([-1, -1, arch.context])
    inputs = [x, t, text, ops.parameter([-1, arch.pooled or -1]), ops.parameter([-1, 6])]
    emb = layers.embedding("time_embedding", layers.waves(ops.convert(t, "f32"), arch.widths[0]))
    if arch.pooled:
        flat = ops.reshape(inputs[4], layers.constant([-1]), False)
        ids = layers.waves(flat, arch.time_ids)
        ids = ops.reshape(ids, layers.constant([-1, 6 * arch.time_ids]), False)
        added = layers.embedding("add_embedding", ops.concat([inputs[3], ids], 1))
        emb = ops.add(emb, added)
    blocks = _UNetBlocks(layers, ops.swish(emb), text, arch.groups, config.get("norm_eps", 1e-5))
    y = layers.conv("conv_in", x)
    skips = [y]
    for i, heads in enumerate(arch.heads):
        stage = f"down_blocks.{i}"
        for j in range(layers.count(f"{stage}.resnets")):
            y = blocks.layer(stage, j, y, heads)
            skips.append(y)
        if layers.has(f"{stage}.downsamplers.0"):
            y = layers.conv(f"{stage}.downsamplers.0.conv", y, stride=2)
            skips.append(y)
    if layers.has("mid_block"):
        y = blocks.layer("mid_block", 0, y, arch.heads[-1])
        for j in range(1, layers.count("mid_block.resnets")):
            y = blocks.resnet(f"mid_block.resnets.{j}", y)
    for i, heads in enumerate(reversed(arch.heads)):
        stage = f"up_blocks.{i}"
        for j in range(layers.count(f"{stage}.resnets")):
            y = blocks.layer(stage, j, ops.concat([y, skips.pop()], 1), heads)
        if layers.has(f"{stage}.upsamplers.0"):
            y = layers.upsampled(f"{stage}.upsamplers.0.conv", y, layers.side_lengths(skips[-1]))
    y = ops.swish(layers.group_norm("conv_norm_out", y, arch.groups, config.get("norm_eps", 1e-5)))
    y = layers.conv("conv_out", y)
    return named(openvino.Model([y], inputs), FlatUNet.inputs, FlatUNet.outputs)


def decoder_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The VAE's decoder as an `openvino.Model`: latents [n, c, h, w] to images [n, 3, 8h, 8w].

    The latents are the U-Net's, divided by the config's `scaling_factor`: the model applies the
    latents' mean and deviation itself.
    """
    import openvino

    layers, groups = _Layers(tensors), config["norm_num_groups"]
    ops, scale = layers.ops, LatentScale(config)
    z = ops.parameter([-1, config["latent_channels"], -1, -1])
    y = ops.add(ops.multiply(z, scale.std.numpy()), scale.mean.numpy())
    y = layers.conv("post_quant_conv", y) if layers.has("post_quant_conv") else y
    y = layers.conv("decoder.conv_in", y)
    y = _vae_resnet(layers, "decoder.mid_block.resnets.0", y, groups)
    if layers.has(name := "decoder.mid_block.attentions.0"):
        flat = layers.flat(layers.group_norm(f"{name}.group_norm", y, groups, _VAE_NORM))
        y = ops.add(y, layers.square(layers.attention(name, flat, flat, 1), y))
    y = _vae_resnet(layers, "decoder.mid_block.resnets.1", y, groups)
    for i in range(layers.count("decoder.up_blocks")):
        stage = f"decoder.up_blocks.{i}"
        for j in range(layers.count(f"{stage}.resnets")):
            y = _vae_resnet(layers, f"{stage}.resnets.{j}", y, groups)
        if layers.has(f"{stage}.upsamplers.0"):
            twice = ops.multiply(layers.side_lengths(y), layers.constant([2, 2]))
            y = layers.upsampled(f"{stage}.upsamplers.0.conv", y, twice)
    y = ops.swish(layers.group_norm("decoder.conv_norm_out", y, groups, _VAE_NORM))
    y = layers.conv("decoder.conv_out", y)
    return named(openvino.Model([y], [z]), FlatDecoder.inputs, FlatDecoder.outputs)


def tiny_decoder_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """A tiny autoencoder's decoder: latents [n, 4, h, w] as the U-Net sees them, divided by the
    config's `scaling_factor`, to images [n, 3, 8h, 8w] in -1 to 1.
    """
    import openvino

    layers, blocks = _Layers(tensors), config["num_decoder_blocks"]
    ops = layers.ops
    z = ops.parameter([-1, config["latent_channels"], -1, -1])
    bound, two, one = (ops.constant(np.float32(value)) for value in (_TINY_MAGNITUDE, 2, 1))
    y = ops.multiply(ops.tanh(ops.divide(z, bound)), bound)
    y = ops.relu(layers.conv("decoder.layers.0", y))
    place = 2  # in the list of layers: activations and upsampling have a place, and no weights
    for stage, number in enumerate(blocks):
        for _ in range(number):
            y = layers.tiny_block(f"decoder.layers.{place}", y)
            place += 1
        if stage + 1 < len(blocks):
            twice = ops.multiply(layers.side_lengths(y), layers.constant([2, 2]))
            y = layers.upsampled(f"decoder.layers.{place + 1}", y, twice)
            place += 2
    y = ops.subtract(ops.multiply(layers.conv(f"decoder.layers.{place}", y), two), one)
    return named(openvino.Model([y], [z]), FlatDecoder.inputs, FlatDecoder.outputs)


def named(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The `openvino.Model`, its inputs and outputs named in their order."""
    ports = zip([*inputs, *outputs], [*model.inputs, *model.outputs], strict=True)
    for name, port in ports:
        port.get_tensor().set_names({name})
    return model


def _vae_resnet(layers: "_Layers", name: str, x: Any, groups: int) -> Any:
    return layers.resnet(name, x, groups, _VAE_NORM)


class _UNetBlocks:
    """The blocks of a U-Net, which share its embedding of time and its text."""

    def __init__(self, layers: "_Layers", emb: Any, text: Any, groups: int, eps: float) -> None:
        self.layers, self.emb, self.text, self.groups, self.eps = layers, emb, text, groups, eps

    def layer(self, stage: str, j: int, x: Any, heads: int) -> Any:
        """A resnet and, if the stage has any, its transformer."""
        y = self.resnet(f"{stage}.resnets.{j}", x)
        name = f"{stage}.attentions.{j}"
        return self.transformer(name, y, heads) if self.layers.has(name) else y

    def resnet(self, name: str, x: Any) -> Any:
        return self.layers.resnet(name, x, self.groups, self.eps, self.emb)

    def transformer(self, name: str, x: Any, heads: int) -> Any:
        """diffusers' Transformer2DModel; its projections are linear layers or 1 x 1 kernels."""
        layers = self.layers
        linear = len(layers.tensors[f"{name}.proj_in.weight"].shape) == 2
        y = layers.group_norm(f"{name}.norm", x, self.groups, _TRANSFORMER_NORM)
        if linear:
            y = layers.linear(f"{name}.proj_in", layers.flat(y))
        else:
            y = layers.flat(layers.conv(f"{name}.proj_in", y))
        for k in range(layers.count(f"{name}.transformer_blocks")):
            y = self.block(f"{name}.transformer_blocks.{k}", y, heads)
        if linear:
            y = layers.square(layers.linear(f"{name}.proj_out", y), x)
        else:
            y = layers.conv(f"{name}.proj_out", layers.square(y, x))
        return layers.ops.add(x, y)

    def block(self, name: str, x: Any, heads: int) -> Any:
        layers, ops = self.layers, self.layers.ops
        normed = layers.layer_norm(f"{name}.norm1", x)
        x = ops.add(x, layers.attention(f"{name}.attn1", normed, normed, heads))
        normed = layers.layer_norm(f"{name}.norm2", x)
        x = ops.add(x, layers.attention(f"{name}.attn2", normed, self.text, heads))
        if not layers.tensors[f"{name}.ff.net.2.weight"].shape.numel():  # pruned as a whole
            return ops.add(x, layers.weight(f"{name}.ff.net.2.bias"))
        both = layers.linear(f"{name}.ff.net.0.proj", layers.layer_norm(f"{name}.norm3", x))
        y, gate = ops.split(both, layers.constant(-1), 2).outputs()
        y = ops.multiply(y, ops.gelu(gate, "erf"))
        return ops.add(x, layers.linear(f"{name}.ff.net.2", y))


class _Layers:
    """Layers by the names of their weights."""

    def __init__(self, tensors: Mapping[str, Tensor | Quantised]) -> None:
        import openvino
        import openvino.opset13 as ops

        self.ov, self.ops, self.tensors = openvino, ops, tensors

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.tensors)

    def count(self, name: str) -> int:
        """The number of layers in the list of that name."""
        found = {key[len(name) + 1 :].partition(".")[0] for key in self.tensors
                 if key.startswith(f"{name}.")}  # fmt: skip
        return len(found)

    def constant(self, value: int | Sequence[int]) -> Any:
        return self.ops.constant(np.array(value, dtype=np.int64))

    def weight(self, name: str, *shape: int) -> Any:
        tensor = self.tensors[name]
        if isinstance(tensor, Quantised):
            return self.dequantised(tensor)
        tensor = tensor.detach().float().contiguous()
        return self.ops.constant(
            (tensor.reshape(shape) if shape else tensor).numpy(), shared_memory=True
        )

    def dequantised(self, layer: Quantised) -> Any:
        """A layer's weight without what is added to it. A matrix is never whole in memory."""
        ops, scale, values = self.ops, layer.scale.half().numpy(), layer.values.numpy()
        if layer.kind == "int4":  # 0 to 15, less 8
            shape = self.ov.Shape([*values.shape[:-1], 2 * values.shape[-1]])
            whole = ops.constant(self.ov.Tensor(values, shape, self.ov.Type.u4))
            number = ops.subtract(ops.convert(whole, "f32"), ops.constant(np.float32(8)))
        else:
            number = ops.convert(ops.constant(values.view(np.int8)), "f32")
        scaled = ops.multiply(number, ops.convert(ops.constant(scale), "f32"))
        out, inputs = layer.shape[0], layer.shape[1:].numel()
        if values.size * 2 > out * inputs and layer.kind == "int4":  # the last group is filled up
            flat = ops.reshape(scaled, self.constant([out, -1]), False)
            scaled = ops.slice(flat, *map(self.constant, ([0], [inputs], [1], [1])))
        return ops.reshape(scaled, self.constant([*layer.shape]), False)

    def added(self, name: str) -> tuple[Any, Any] | None:
        """left [o, r] and right [r, i], whose product is added to a layer's weight in 4 bits."""
        layer = self.tensors[f"{name}.weight"]
        if not isinstance(layer, Quantised) or layer.added is None:
            return None
        ops = self.ops
        left, right = (ops.convert(ops.constant(one.half().numpy()), "f32") for one in layer.added)
        return left, right

    # --- layers with weights ------------------------------------------------------------

    def conv(self, name: str, x: Any, stride: int = 1) -> Any:
        """A kernel of odd side, padded to keep the size."""
        weight = self.weight(f"{name}.weight")
        if added := self.added(name):  # OpenVINO runs no kernel in 4 bits
            product = self.ops.matmul(*added, False, False)
            weight = self.ops.add(weight, self.ops.reshape(product, weight.shape, False))
        side = weight.shape[-1]
        pads = [side // 2] * 2
        y = self.ops.convolution(x, weight, [stride] * 2, pads, pads, [1, 1])
        bias = f"{name}.bias"
        return self.ops.add(y, self.weight(bias, 1, -1, 1, 1)) if bias in self.tensors else y

    def linear(self, name: str, x: Any) -> Any:
        ops, bias = self.ops, f"{name}.bias"
        y = ops.matmul(x, self.weight(f"{name}.weight"), False, True)
        if added := self.added(name):
            left, right = added
            y = ops.add(y, ops.matmul(ops.matmul(x, right, False, True), left, False, True))
        return ops.add(y, self.weight(bias)) if bias in self.tensors else y

    def group_norm(self, name: str, x: Any, groups: int, eps: float) -> Any:
        scale, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.ops.group_normalization(x, scale, shift, groups, eps)

    def layer_norm(self, name: str, x: Any) -> Any:
        normed = self.ops.mvn(x, self.constant([-1]), True, _LAYER_NORM, "inside_sqrt")
        scaled = self.ops.multiply(normed, self.weight(f"{name}.weight"))
        return self.ops.add(scaled, self.weight(f"{name}.bias"))

    def embedding(self, name: str, x: Any) -> Any:
        return self.linear(f"{name}.linear_2", self.ops.swish(self.linear(f"{name}.linear_1", x)))

    def resnet(self, name: str, x: Any, groups: int, eps: float, emb: Any = None) -> Any:
        """A residual block; `emb` [n, d] is added between its kernels."""
        ops = self.ops
        y = self.conv(f"{name}.conv1", ops.swish(self.group_norm(f"{name}.norm1", x, groups, eps)))
        if emb is not None:
            shift = self.linear(f"{name}.time_emb_proj", emb)
            y = ops.add(y, ops.unsqueeze(shift, self.constant([2, 3])))
        full, width = self.tensors[f"{name}.conv2.weight"].shape[:2]
        groups = groups * width // full  # fewer in a pruned model
        y = self.conv(f"{name}.conv2", ops.swish(self.group_norm(f"{name}.norm2", y, groups, eps)))
        if self.has(f"{name}.conv_shortcut"):
            x = self.conv(f"{name}.conv_shortcut", x)
        return ops.add(x, y)

    def tiny_block(self, name: str, x: Any) -> Any:
        """A residual block of `AutoencoderTiny`, of one width: three kernels without norms."""
        y = x
        for place in (0, 2):
            y = self.ops.relu(self.conv(f"{name}.conv.{place}", y))
        return self.ops.relu(self.ops.add(self.conv(f"{name}.conv.4", y), x))

    def attention(self, name: str, x: Any, context: Any, heads: int) -> Any:
        """Of x [n, s, d] to the context [n, s', d']."""
        ops, asked = self.ops, {"to_q": x, "to_k": context, "to_v": context}
        full, width = self.tensors[f"{name}.to_out.0.weight"].shape
        heads = heads * width // full  # fewer in a pruned model
        if not heads:
            return self.weight(f"{name}.to_out.0.bias")
        parts = []
        for projection, given in asked.items():
            y = self.linear(f"{name}.{projection}", given)
            y = ops.reshape(y, self.constant([0, 0, heads, width // heads]), True)
            parts.append(ops.transpose(y, self.constant([0, 2, 1, 3])))
        y = ops.scaled_dot_product_attention(*parts, causal=False)
        y = ops.transpose(y, self.constant([0, 2, 1, 3]))
        return self.linear(f"{name}.to_out.0", ops.reshape(y, self.constant([0, 0, width]), True))

    # --- layers without -----------------------------------------------------------------

    def waves(self, x: Any, width: int) -> Any:
        """Sinusoids of x [n]: [n, width], cosines first (arXiv 1706.03762, section 3.5)."""
        half = width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = self.ops.multiply(
            self.ops.unsqueeze(x, self.constant([1])), self.ops.constant(rates[None].numpy())
        )
        return self.ops.concat([self.ops.cos(angles), self.ops.sin(angles)], 1)

    def flat(self, x: Any) -> Any:
        """[n, c, h, w] as [n, s, c]."""
        channels = x.get_output_partial_shape(0)[1].get_length()
        rows = self.ops.transpose(x, self.constant([0, 2, 3, 1]))
        return self.ops.reshape(rows, self.constant([0, -1, channels]), True)

    def square(self, x: Any, like: Any) -> Any:
        """[n, s, c] as [n, c, h, w], with the sides of `like`."""
        ops = self.ops
        channels = x.get_output_partial_shape(0)[2].get_length()
        shape = ops.concat(
            [self.constant([0]), self.side_lengths(like), self.constant([channels])], 0
        )
        return ops.transpose(ops.reshape(x, shape, True), self.constant([0, 3, 1, 2]))

    def side_lengths(self, x: Any) -> Any:
        """(h, w) of x."""
        ops = self.ops
        return ops.gather(ops.shape_of(x, "i64"), self.constant([2, 3]), self.constant(0))

    def upsampled(self, name: str, x: Any, sides: Any) -> Any:
        """A kernel over x, enlarged to `sides` by repeating its nearest positions."""
        larger = self.ops.interpolate(
            x, sides, "nearest", "sizes", coordinate_transformation_mode="asymmetric",
            nearest_mode="floor", axes=self.constant([2, 3]),
        )  # fmt: skip
        return self.conv(name, larger)
