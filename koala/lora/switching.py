"""LoRAs that change from one step to the next, as requests with different ones take turns."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from koala.lora.adapters import Attached, Modules
from koala.lora.reading import Lora

KEPT = 8  # LoRAs whose matrices stay loaded: those worn last


class LoraSwitcher:
    """What a model wears besides its weights; `read` says what a file's LoRA does to it."""

    def __init__(self, modules: Callable[[], Modules], read: Callable[[Path], Lora]) -> None:
        self._modules, self._read = modules, read
        self._loaded: OrderedDict[Path, Attached] = OrderedDict()
        self._active: tuple[tuple[Path, float], ...] = ()

    def switch(self, loras: Sequence[tuple[Path, float]]) -> bool:
        """Puts these on, in this order, and takes all others off; whether that changed anything.

        UserError for a file that cannot be read; all stays as it was then.
        """
        wanted = tuple(loras)
        if wanted == self._active:
            return False
        found = [(self._get(path), scale) for path, scale in wanted]
        for path, _ in self._active:
            self._loaded[path].remove()
        for attached, scale in found:
            attached.scale = scale
            attached.put_on()
        self._active = wanted
        while len(self._loaded) > max(KEPT, len(wanted)):
            self._loaded.popitem(last=False)  # not worn: those wanted were the last to be got
        return True

    def _get(self, path: Path) -> Attached:
        if path not in self._loaded:
            self._loaded[path] = Attached(self._modules(), self._read(path), put_on=False)
        self._loaded.move_to_end(path)
        return self._loaded[path]
