"""Switches LoRAs between steps, as requests with different LoRAs take turns."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from koala.lora.adapters import Attached, Modules
from koala.lora.reading import Lora

KEPT = 8  # LoRAs kept loaded: those used last


class LoraSwitcher:
    """The active LoRAs of a model. read: reads a LoRA file for that model."""

    def __init__(self, modules: Callable[[], Modules], read: Callable[[Path], Lora]) -> None:
        self._modules, self._read = modules, read
        self._loaded: OrderedDict[Path, Attached] = OrderedDict()
        self._active: tuple[tuple[Path, float], ...] = ()

    @property
    def active(self) -> bool:
        """Whether any LoRA is active."""
        return bool(self._active)

    def switch(self, loras: Sequence[tuple[Path, float]]) -> bool:
        """Activates exactly these, in this order; returns whether that changed anything.

        UserError for a file that cannot be read; then nothing changes.
        """
        wanted = tuple(loras)
        if wanted == self._active:
            return False
        found = [(self._get(path), scale) for path, scale in wanted]
        for path, _ in self._active:
            self._loaded[path].remove()
        for attached, scale in found:
            attached.scale = scale
            attached.attach()
        self._active = wanted
        while len(self._loaded) > max(KEPT, len(wanted)):
            self._loaded.popitem(last=False)  # not active: the active ones were used last
        return True

    def _get(self, path: Path) -> Attached:
        if path not in self._loaded:
            self._loaded[path] = Attached(self._modules(), self._read(path), attach=False)
        self._loaded.move_to_end(path)
        return self._loaded[path]
