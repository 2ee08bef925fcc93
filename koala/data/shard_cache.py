"""Which shards of a remote folder are on this disk: those of the windows that are being read.

Every bucket begins a window of shards now and then and wants nearly all of them at once, so shards
are fetched many batches before they are read. A window that a bucket has left is not read again:
its shards go, unless another window wants them.
"""

from collections import Counter
from typing import NamedTuple, TypeVar

from koala.data.index import Index
from koala.data.sampler import BatchOrder

FAR_AHEAD = 64  # batches

T = TypeVar("T")
Window = tuple[int, int, int]  # bucket, epoch, number


class BatchShare(NamedTuple):
    """Which part of every batch a process reads."""

    size: int  # samples of a batch
    rank: int
    world: int

    def of(self, batch: list[T]) -> list[T]:
        """The part's samples."""
        share = self.size // self.world
        return batch[self.rank * share : (self.rank + 1) * share]


class ShardCache:
    """Keeps the shards of the next batches at hand. For one thread."""

    def __init__(self, index: Index, order: BatchOrder):
        self._index, self._order = index, order
        self._part: BatchShare | None = None
        self._named = range(0)  # batches whose shards were named
        self._held: dict[Window, set[str]] = {}
        self._wanted: Counter[str] = Counter()  # by how many windows

    def reach(self, number: int, part: BatchShare) -> None:
        """A batch is to be read: names those after it, and lets go what the batches before held."""
        if not self._index.files.remote:
            return
        if part != self._part or not self._named.start <= number <= self._named.stop:
            self._leave([*self._held])
            self._part, self._named = part, range(number, number)
        for coming in range(self._named.stop, number + FAR_AHEAD):
            self._name(coming, part)
        self._named = range(number, number + FAR_AHEAD)
        bucket, *now = self._order.windows(number, part.size)[0]
        self._leave([w for w in self._held if w[0] == bucket and [*w[1:]] < now])

    def _name(self, number: int, part: BatchShare) -> None:
        places = part.of(self._order.batch(number, part.size))
        names = [self._index.name(shard) for shard in dict.fromkeys(s for s, _ in places)]
        # The last one where it reaches over two: what is of the first stays a little longer.
        held = self._held.setdefault(self._order.windows(number, part.size)[-1], set())
        self._wanted.update(name for name in names if name not in held)
        held.update(names)
        self._index.files.foretell(names)

    def _leave(self, windows: list[Window]) -> None:
        for window in windows:
            for name in self._held.pop(window):
                self._wanted[name] -= 1
                if not self._wanted[name]:
                    del self._wanted[name]
                    self._index.files.forget(name)
