"""Weights that are on the device only while they are needed.

A model is split into units: a residual block, a transformer block, a layer of a text encoder. The
weights of a unit lie on the host in one piece: in pinned memory where the device is a GPU, in a
temporary file where it is the CPU, whose own memory is what is short. From there

- `Visiting` brings a whole model to the device and lets it go again, in turns with others;
- `Streaming` brings one unit after the other, each while the one before it works;
- `Resident` stays, and others leave before it works.

What belongs to no unit (the first and last layers, the time embedding) is small and stays.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextEmbeddings

UNITS = (
    ResnetBlock2D,
    BasicTransformerBlock,
    Downsample2D,
    Upsample2D,
    Attention,
    CLIPEncoderLayer,
    CLIPTextEmbeddings,
)
_ALIGNED = 256  # bytes: where every tensor of a unit begins, as a GPU likes it


def units_of(model: nn.Module) -> list[nn.Module]:
    """The units of a U-Net, VAE or text encoder, none inside another."""
    if isinstance(model, UNITS):
        return [model]
    return [unit for child in model.children() for unit in units_of(child)]


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Every parameter and buffer, once."""
    every = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return list({id(t): t for t in every}.values())


def packed_size(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors take side by side, each at an aligned place."""
    return sum(_room(tensor) for tensor in tensors)


def _room(tensor: Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNED) * _ALIGNED


class Unit:
    """The weights of one module: on the host, and in a buffer on the device when they are used."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Takes the weights away from where they are."""
        self.module = module
        self.tensors = tensors_of([module])
        self.size = packed_size(self.tensors)
        ends = accumulate(map(_room, self.tensors), initial=0)
        self._places = [
            (at, t.dtype, t.shape, t.stride()) for at, t in zip(ends, self.tensors, strict=False)
        ]
        flat = torch.empty(self.size, dtype=torch.uint8)
        self._absent = [torch.empty((), dtype=t.dtype).expand(t.shape) for t in self.tensors]
        for tensor, place in zip(self.tensors, self._views(flat), strict=True):
            place.copy_(tensor)
        if device.type == "cpu":
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the unit lives)
            self._file.write(memoryview(flat.numpy()))
            self._host = None
        else:
            self._host = flat.pin_memory() if device.type == "cuda" else flat
        self.leave()

    def copy(self, buffer: Tensor) -> None:
        """Copies the weights into `buffer`, uint8 [size] on the device; pinned: asynchronously."""
        if self._host is not None:
            buffer.copy_(self._host, non_blocking=True)
        else:
            self._file.seek(0)
            self._file.readinto(memoryview(buffer.numpy()))

    def use(self, buffer: Tensor) -> None:
        """The module's weights are from now on those that lie in `buffer`."""
        self._point_at(self._views(buffer))

    def leave(self) -> None:
        """The module has no weights: only their shapes and dtypes."""
        self._point_at(self._absent)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as they lie in `buffer`, with their strides (channels last, as it may be)."""
        return [
            buffer[at : at + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .as_strided(shape, stride)
            for at, dtype, shape, stride in self._places
        ]

    def _point_at(self, places: Sequence[Tensor]) -> None:
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place


class Visitor:
    """Models whose units come to the device with `enter` and are away again after `leave`."""

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        """Takes the units' weights to the host, and all others to the device."""
        self.models, self.device = models, device
        self.units = [Unit(module, device) for model in models for module in units_of(model)]
        visiting = {id(tensor) for unit in self.units for tensor in unit.tensors}
        for tensor in tensors_of(models):
            if id(tensor) not in visiting:
                tensor.data = tensor.data.to(device)

    def enter(self) -> None:
        raise NotImplementedError

    def leave(self) -> None:
        raise NotImplementedError

    def release(self) -> None:
        """Makes ordinary models of them again, on the CPU."""
        self.leave()
        for unit in self.units:
            buffer = torch.empty(unit.size, dtype=torch.uint8)
            unit.copy(buffer)
            unit.use(buffer)
        for model in self.models:
            model.to("cpu")


class Resident(Visitor):
    """Models that stay on the device, and before whose work the others leave."""

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        self.models, self.device, self.units = models, device, []
        for model in models:
            model.to(device)

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        pass


class Visiting(Visitor):
    """Whole models on the device."""

    # Not inference tensors, even inside a caller's mode: they are other tensors' data.
    @torch.inference_mode(False)
    def enter(self) -> None:
        for unit in self.units:
            buffer = torch.empty(unit.size, dtype=torch.uint8, device=self.device)
            unit.copy(buffer)
            unit.use(buffer)

    def leave(self) -> None:
        for unit in self.units:
            unit.leave()


class Streaming(Visitor):
    """Two units on the device: one that works, one that is on its way.

    On a GPU the copies have a stream of their own. Which unit follows which is learnt from the
    first run; a unit that was not expected is copied when it is wanted.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__(models, device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: dict[Unit, Unit] = {}
        self._handles: list[RemovableHandle] = []
        self._slots: list[Tensor] = []
        for unit in self.units:
            self._handles += [
                unit.module.register_forward_pre_hook(partial(self._arrive, unit)),
                unit.module.register_forward_hook(partial(self._depart, unit)),
            ]
        self.leave()

    @torch.inference_mode(False)
    def enter(self) -> None:
        """Makes room for two units."""
        largest = max(unit.size for unit in self.units)
        self._slots = [
            torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)
        ]

    def leave(self) -> None:
        """Gives the room back."""
        if self._side is not None:  # which may still be copying into it
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._slots = []
        self._at = 0  # the slot of the unit that came last
        self._last: Unit | None = None
        self._coming: Unit | None = None  # lies in the other slot, or is being copied there

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        super().release()

    def _arrive(self, unit: Unit, *_: Any) -> None:
        if self._coming is not unit:
            self._fetch(unit)
        self._at, self._coming = 1 - self._at, None
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        unit.use(self._slots[self._at])
        if self._last is not None:
            self._next[self._last] = unit
        self._last = unit
        if (following := self._next.get(unit)) is not None:
            self._fetch(following)

    def _depart(self, unit: Unit, *_: Any) -> None:
        unit.leave()

    @torch.inference_mode(False)
    def _fetch(self, unit: Unit) -> None:
        """Copies a unit into the slot that is not in use."""
        room = self._slots[1 - self._at][: unit.size]
        self._coming = unit
        if self._side is None:
            unit.copy(room)
            return
        # All that has been asked of the device so far may still read what the slot held.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            unit.copy(room)


class Turns:
    """Sees to it that of several visitors one at a time is on the device."""

    def __init__(self) -> None:
        self._inside: Visitor | None = None
        self._visitors: list[Visitor] = []
        self._handles: list[RemovableHandle] = []

    def admit(self, visitor: Visitor, doors: Sequence[nn.Module]) -> None:
        """Whenever one of the modules `doors` is called, the visitor enters before that.

        The call's tensors go to its device, too.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            self._enter(visitor)
            return _on(args, visitor.device), _on(kwargs, visitor.device)

        self._visitors.append(visitor)
        for door in doors:
            self._handles.append(
                door.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            )

    def clear(self) -> None:
        """Nobody is on the device."""
        if self._inside is not None:
            self._inside.leave()
            self._inside = None

    def release(self) -> None:
        """Makes ordinary models of all visitors again, on the CPU."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        for visitor in self._visitors:
            visitor.release()
        self._handles, self._visitors = [], []

    def _enter(self, wanted: Visitor) -> None:
        if self._inside is not wanted:
            self.clear()
            wanted.enter()
            self._inside = wanted


def _on(value: Any, device: torch.device) -> Any:
    """Every tensor in tuples and dicts, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    return value
