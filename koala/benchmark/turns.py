"""Who draws when: the ways to draw one model, timed in turns or one after the other."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch

from koala.architectures.layout import parameters
from koala.benchmark.cases import BUDGETS, Subject
from koala.benchmark.drawer import Drawer, Drawn, RemoteDrawer
from koala.benchmark.measure import GB, Timing
from koala.benchmark.ratio import FEWEST, Ratio, ratio
from koala.benchmark.ways import STOCK, Way
from koala.generation.runtime.backends import SMALL


@dataclass(frozen=True)
class Turns:
    """The ways to draw one model, and for how long they are measured."""

    chosen: Subject
    ways: Sequence[Way]  # stock diffusers first
    device: torch.device
    dtype: str
    threads: int | None  # on a CPU
    rounds: int  # images of each way, at most
    until: float  # of time.monotonic: no image begins after it, but the first of each way

    def measured(self) -> dict[str, "Measured"]:
        """What each way took, by its name."""
        small = parameters(self.chosen.architecture) <= SMALL
        return self._in_turn() if small and self.device.type == "cpu" else self._in_a_row()

    def _in_turn(self) -> dict[str, "Measured"]:
        """All ways stand ready; each draws one image in every round, each round the other way."""
        found = {way.name: Measured() for way in self.ways}
        with ExitStack() as stack:
            drawers = {
                way.name: stack.enter_context(closing(self._drawer(way))) for way in self.ways
            }
            for number in range(self.rounds):
                for name in list(drawers)[:: 1 if number % 2 == 0 else -1]:
                    found[name].images.append(drawers[name].draw())
                others = [one.beside(found[STOCK]) for name, one in found.items() if name != STOCK]
                if time.monotonic() > self.until or all(one.narrow for one in others):
                    break
            for name, drawer in drawers.items():
                found[name].finish(drawer)
        return found

    def _in_a_row(self) -> dict[str, "Measured"]:
        """One way after the other: on a GPU or at full size not all fit into the memory."""
        found = {}
        start = time.monotonic()
        for number, way in enumerate(self.ways, 1):
            until = start + (self.until - start) * number / len(self.ways)
            one = found[way.name] = Measured()
            try:
                with closing(self._drawer(way)) as drawer:
                    for _ in range(min(self.rounds, FEWEST)):
                        one.images.append(drawer.draw())
                        if time.monotonic() > until:
                            break
                    one.finish(drawer)
                    if isinstance(drawer, Drawer) and self.device.type == "cuda":
                        one.budgets = {each: drawer.under(each) for each in self._budgets()}
            except torch.OutOfMemoryError:
                one.images.clear()
        return found

    def _drawer(self, way: Way) -> Drawer | RemoteDrawer:
        kind = RemoteDrawer if self.device.type == "cpu" else Drawer
        return kind(self.chosen, way, self.device, self.dtype, self.threads)

    def _budgets(self) -> Iterator[int]:
        """Memory budgets in GB that the CUDA allocator can be limited to."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        return (budget for budget in BUDGETS if budget * GB < total)


@dataclass
class Measured:
    """What one way took; without images it ran out of memory."""

    images: list[Drawn] = field(default_factory=list)
    backend: str = "torch"
    unet: Timing | None = None
    peak_gb: float | None = None
    flops: int | None = None
    budgets: dict[int, float | None] = field(default_factory=dict)

    def finish(self, drawer: Drawer | RemoteDrawer) -> None:
        """Takes over what does not need rounds."""
        self.backend, self.peak_gb = drawer.backend, drawer.peak_gb()  # before the U-Net alone
        self.unet, self.flops = drawer.unet(), drawer.flops()

    @property
    def seconds(self) -> list[float]:
        return [image.seconds for image in self.images]

    def beside(self, stock: "Measured") -> Ratio:
        """How many times as fast as stock diffusers, whose i-th image is the i-th one's pair."""
        pairs = min(len(self.images), len(stock.images))
        return ratio(stock.seconds[:pairs], self.seconds[:pairs])
