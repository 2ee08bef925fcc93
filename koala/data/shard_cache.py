"""The local cache of a remote folder's shards: those of the windows being read.

A bucket that starts a window of shards needs nearly all of them at once, so shards are downloaded
many batches before they are read. A window is never read again once its bucket has left it: its
shards are then removed, unless another window needs them.
"""

from collections import Counter
from typing import NamedTuple, TypeVar

from koala.data.index import Index
from koala.data.sampler import BatchOrder

FAR_AHEAD = 64  # batches

T = TypeVar("T")
Window = tuple[int, int, int]  # bucket, epoch, number


class BatchShare(NamedTuple):
    """The share of every batch that one process reads."""

    size: int  # samples of a batch
    rank: int
    world: int

    def of(self, batch: list[T]) -> list[T]:
        """The samples of this share."""
        count = self.size // self.world
        return batch[self.rank * count : (self.rank + 1) * count]


class ShardCache:
    """Caches the shards of the next batches. Not thread-safe."""

    def __init__(self, index: Index, order: BatchOrder):
        self._index, self._order = index, order
        self._share: BatchShare | None = None
        self._requested = range(0)  # batches whose shards were requested
        self._held: dict[Window, set[str]] = {}
        self._wanted: Counter[str] = Counter()  # shard -> windows that need it

    def advance_to(self, number: int, share: BatchShare) -> None:
        """Before a batch is read: requests the next batches' shards and releases earlier ones."""
        if not self._index.files.remote:
            return
        if share != self._share or not self._requested.start <= number <= self._requested.stop:
            self._release([*self._held])
            self._share, self._requested = share, range(number, number)
        for coming in range(self._requested.stop, number + FAR_AHEAD):
            self._request(coming, share)
        self._requested = range(number, number + FAR_AHEAD)
        bucket, *now = self._order.windows(number, share.size)[0]
        self._release([w for w in self._held if w[0] == bucket and [*w[1:]] < now])

    def _request(self, number: int, share: BatchShare) -> None:
        places = share.of(self._order.batch(number, share.size))
        names = [self._index.name(shard) for shard in dict.fromkeys(s for s, _ in places)]
        # A batch over two windows counts for the last: the first's shards stay a little longer.
        held = self._held.setdefault(self._order.windows(number, share.size)[-1], set())
        self._wanted.update(name for name in names if name not in held)
        held.update(names)
        self._index.files.prefetch(names)

    def _release(self, windows: list[Window]) -> None:
        for window in windows:
            for name in self._held.pop(window):
                self._wanted[name] -= 1
                if not self._wanted[name]:
                    del self._wanted[name]
                    self._index.files.forget(name)
