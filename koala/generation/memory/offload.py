"""Offloading: weights that are on the device only while they are needed.

A model is split into units: a residual block, a transformer block, a layer of a text encoder. The
weights of a unit lie on the host in one piece: in pinned memory if the device is a GPU, in a
temporary file if it is the CPU, whose own memory is short then.

- `ModelOffload` brings a whole model to the device while it works.
- `GroupOffload` brings one unit after the other, each while the one before it works.
- `Resident` stays on the device.
- `OneAtATime` offloads the model that worked last before another one works.

Layers outside the units (the first and last ones, the time embedding) are small and stay.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from koala.generation.memory.estimate import ALIGNED
from koala.utils.networks import (
    Attention,
    BasicTransformerBlock,
    CLIPEncoderLayer,
    CLIPTextEmbeddings,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
)

UNITS = (
    ResnetBlock2D,
    BasicTransformerBlock,
    Downsample2D,
    Upsample2D,
    Attention,
    CLIPEncoderLayer,
    CLIPTextEmbeddings,
)


def units_of(model: nn.Module) -> list[nn.Module]:
    """The units of a U-Net, VAE or text encoder, none inside another."""
    if isinstance(model, UNITS):
        return [model]
    return [unit for child in model.children() for unit in units_of(child)]


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Every parameter and buffer, once."""
    every = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return list({id(t): t for t in every}.values())


def aligned_size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors side by side, each aligned."""
    return sum(_aligned(tensor) for tensor in tensors)


def _aligned(tensor: Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / ALIGNED) * ALIGNED


class Unit:
    """The weights of one module: on the host, and in a buffer on the device while in use."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Moves the weights to the host."""
        self.module = module
        self.tensors = tensors_of([module])
        self.size = aligned_size(self.tensors)
        ends = accumulate(map(_aligned, self.tensors), initial=0)
        self._places = [
            (at, t.dtype, t.shape, t.stride()) for at, t in zip(ends, self.tensors, strict=False)
        ]
        flat = torch.empty(self.size, dtype=torch.uint8)
        self._empty = [torch.empty((), dtype=t.dtype).expand(t.shape) for t in self.tensors]
        for tensor, place in zip(self.tensors, self._views(flat), strict=True):
            place.copy_(tensor)
        if device.type == "cpu":
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the unit lives)
            self._file.write(flat.numpy().data)
            self._host = None
        else:
            self._host = flat.pin_memory() if device.type == "cuda" else flat
        self.drop()

    def copy(self, buffer: Tensor) -> None:
        """Copies the weights into `buffer`, uint8 [size] on the device; on CUDA asynchronously."""
        if self._host is not None:
            buffer.copy_(self._host, non_blocking=True)
        else:
            self._file.seek(0)
            self._file.readinto(buffer.numpy().data)

    def use(self, buffer: Tensor) -> None:
        """Makes those in `buffer` the module's weights."""
        self._point_at(self._views(buffer))

    def drop(self) -> None:
        """Leaves the module the shapes and dtypes of its weights only."""
        self._point_at(self._empty)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in `buffer`, with their strides (such as channels_last)."""
        return [
            buffer[at : at + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .as_strided(shape, stride)
            for at, dtype, shape, stride in self._places
        ]

    def _point_at(self, places: Sequence[Tensor]) -> None:
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place


class Offload:
    """Models whose units are on the device from `onload` to `offload`."""

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        """Moves the units' weights to the host, and all others to the device."""
        self.models, self.device = models, device
        self.units = [Unit(module, device) for model in models for module in units_of(model)]
        offloaded = {id(tensor) for unit in self.units for tensor in unit.tensors}
        for tensor in tensors_of(models):
            if id(tensor) not in offloaded:
                tensor.data = tensor.data.to(device)

    def onload(self) -> None:
        raise NotImplementedError

    def offload(self) -> None:
        raise NotImplementedError

    def release(self) -> None:
        """Makes them ordinary models again, on the CPU."""
        self.offload()
        for unit in self.units:
            buffer = torch.empty(unit.size, dtype=torch.uint8)
            unit.copy(buffer)
            unit.use(buffer)
        for model in self.models:
            model.to("cpu")


class Resident(Offload):
    """Models that stay on the device."""

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        self.models, self.device, self.units = models, device, []
        for model in models:
            model.to(device)

    def onload(self) -> None:
        pass

    def offload(self) -> None:
        pass


class ModelOffload(Offload):
    """Whole models on the device."""

    # Not inference tensors, even inside a caller's mode: they are other tensors' data.
    @torch.inference_mode(False)
    def onload(self) -> None:
        for unit in self.units:
            buffer = torch.empty(unit.size, dtype=torch.uint8, device=self.device)
            unit.copy(buffer)
            unit.use(buffer)

    def offload(self) -> None:
        for unit in self.units:
            unit.drop()


class GroupOffload(Offload):
    """Two units on the device: one that works, and the next, which is being copied.

    On CUDA the copies have a stream of their own. The order of the units is learnt from the first
    run; an unexpected unit is copied when it is called.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__(models, device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: dict[Unit, Unit] = {}
        self._handles: list[RemovableHandle] = []
        self._slots: list[Tensor] = []
        for unit in self.units:
            self._handles += [
                unit.module.register_forward_pre_hook(partial(self._before, unit)),
                unit.module.register_forward_hook(partial(self._after, unit)),
            ]
        self.offload()

    @torch.inference_mode(False)
    def onload(self) -> None:
        """Allocates the buffers of two units."""
        largest = max(unit.size for unit in self.units)
        self._slots = [
            torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)
        ]

    def offload(self) -> None:
        """Frees the buffers."""
        if self._side is not None:  # which may still be copying into them
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._slots = []
        self._at = 0  # the slot of the unit that came last
        self._last: Unit | None = None
        self._coming: Unit | None = None  # lies in the other slot, or is being copied there

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        super().release()

    def _before(self, unit: Unit, *_: Any) -> None:
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

    def _after(self, unit: Unit, *_: Any) -> None:
        unit.drop()

    @torch.inference_mode(False)
    def _fetch(self, unit: Unit) -> None:
        """Copies a unit into the free slot."""
        room = self._slots[1 - self._at][: unit.size]
        self._coming = unit
        if self._side is None:
            unit.copy(room)
            return
        # Work that is queued on the device may still read what the slot held.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            unit.copy(room)


class OneAtATime:
    """Keeps at most one of several offloaded parts on the device."""

    def __init__(self) -> None:
        self._onloaded: Offload | None = None
        self._parts: list[Offload] = []
        self._handles: list[RemovableHandle] = []

    def add(self, part: Offload, first: Sequence[nn.Module]) -> None:
        """Onloads the part whenever one of the modules `first` is called, before they run.

        The call's tensors go to its device, too.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            self._onload(part)
            return _on(args, part.device), _on(kwargs, part.device)

        self._parts.append(part)
        for module in first:
            self._handles.append(
                module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            )

    def clear(self) -> None:
        """Offloads the part that is on the device."""
        if self._onloaded is not None:
            self._onloaded.offload()
            self._onloaded = None

    def release(self) -> None:
        """Makes all parts ordinary models again, on the CPU."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        for part in self._parts:
            part.release()
        self._handles, self._parts = [], []

    def _onload(self, part: Offload) -> None:
        if self._onloaded is not part:
            self.clear()
            part.onload()
            self._onloaded = part


def _on(value: Any, device: torch.device) -> Any:
    """The value with every tensor, in tuples and dicts too, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    return value
