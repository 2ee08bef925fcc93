"""The order in which a training sees its samples: a stateless function of the seed.

Each bucket is an endless stream of epochs, each in a new order. In an epoch the bucket's shards are
shuffled, and then the samples within every window of neighbouring shards. A batch is the next
stretch of one bucket's stream and may span two epochs, so nothing is left over: **a bucket's tail
joins its next epoch**, and each epoch of a bucket shows every sample exactly once. (A bucket with
fewer samples than a batch fills it with several epochs and comes up less often.)

After E epochs, bucket b with N_b samples has given floor(E N_b / B) batches of size B. The batches
between E and E + 1 epochs are shuffled over the buckets. So the n-th batch follows from n alone, at
a cost that depends on the number of shards and batches, not of samples.

Samples of one window are sorted by shard and row within a batch, so processes that share batches
also share the shards: each reads few of a window's.
"""

from functools import lru_cache

import numpy as np

WINDOW = 64  # shards


def shuffled(length: int, first: int, count: int, seed: int) -> list[int]:
    """Samples first..first+count-1 of an endless stream; every epoch is another permutation."""
    orders = {
        e: np.random.default_rng((seed, e)).permutation(length)
        for e in range(first // length, (first + count - 1) // length + 1)
    }
    return [int(orders[k // length][k % length]) for k in range(first, first + count)]


class BatchOrder:
    """The samples of the n-th batch."""

    def __init__(
        self, shards: np.ndarray, rows: np.ndarray, buckets: np.ndarray, seed: int,
        window: int = WINDOW,
    ):  # fmt: skip
        """int [s] each: shards of an epoch (repeated shards are shown repeatedly), their numbers of
        rows, all above 0, and their buckets, 0, 1, ... without gaps.
        """
        assert len(shards) and rows.min() > 0 and window > 0
        self.seed, self.window = seed, window
        self.sizes = np.bincount(buckets, rows).astype(np.int64)  # [buckets], samples
        by_bucket = np.argsort(buckets, kind="stable")
        ends = np.cumsum(np.bincount(buckets))
        self._shards = np.split(shards[by_bucket], ends[:-1])
        self._rows = np.split(rows[by_bucket].astype(np.int64), ends[:-1])
        # Cached: the orders of the latest epochs and windows.
        many = 2 * len(self.sizes)
        self._labels = lru_cache(maxsize=2)(self._buckets_of_epoch)
        self._epochs = lru_cache(maxsize=many)(self._shards_of_epoch)
        self._windows = lru_cache(maxsize=many)(self._rows_of_window)

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch."""
        return int(self.sizes.sum())

    def batch(self, number: int, size: int) -> list[tuple[int, int]]:
        """(shard, row) of each sample of a batch, all of one bucket."""
        return self._stretch(*self._place_of(number, size), size)

    def stratified(self, count: int) -> list[list[tuple[int, int]]]:
        """(shard, row) of at most `count` samples by bucket, in proportion to the buckets' sizes.

        Each sample once, and one of each bucket if `count` allows. Empty buckets are left out.
        """
        count = min(count, self.epoch_length)
        shares = self.sizes * count / self.epoch_length
        numbers = np.floor(shares).astype(np.int64)
        if count >= len(numbers):
            numbers = np.maximum(numbers, 1)
        while (over := int(numbers.sum()) - count) != 0:
            lacking = shares - numbers
            if over > 0:  # take from the one that has most beyond its share, and keep one
                numbers[np.argmin(np.where(numbers > 1, lacking, np.inf))] -= 1
            else:
                numbers[np.argmax(np.where(numbers < self.sizes, lacking, -np.inf))] += 1
        return [self._stretch(bucket, 0, int(n)) for bucket, n in enumerate(numbers) if n]

    def windows(self, number: int, size: int) -> list[tuple[int, int, int]]:
        """(bucket, epoch, window) of each window that a batch takes samples from, in order.

        A bucket's windows follow one another, and none is repeated.
        """
        bucket, first = self._place_of(number, size)
        found, at = [], first
        while at < first + size:
            epoch, place = divmod(at, int(self.sizes[bucket]))
            window, end = self._window_at(bucket, epoch, place)
            found.append((bucket, epoch, window))
            at += end - place
        return found

    def _place_of(self, number: int, size: int) -> tuple[int, int]:
        """A batch's bucket, and its first sample in the bucket's stream."""
        epoch, start = self._epoch_of(number, size)
        labels, ordinals = self._labels(epoch, size)
        bucket = int(labels[number - start])
        first = (self._given(epoch, size)[bucket] + int(ordinals[number - start])) * size
        return bucket, int(first)

    def _window_at(self, bucket: int, epoch: int, place: int) -> tuple[int, int]:
        """The window of a sample of a bucket's epoch, and the end of that window."""
        starts = self._epochs(bucket, epoch)[2]
        window = int(np.searchsorted(starts, place, "right")) - 1
        last = window + 1 == len(starts)
        return window, int(self.sizes[bucket] if last else starts[window + 1])

    def _given(self, epochs: int, size: int) -> np.ndarray:
        """int [buckets]: batches that each bucket has given after that many epochs."""
        return epochs * self.sizes // size

    def _epoch_of(self, number: int, size: int) -> tuple[int, int]:
        """The epoch that a batch belongs to, and the epoch's first batch."""
        epoch = number * size // self.epoch_length  # or one of the next
        while self._given(epoch + 1, size).sum() <= number:
            epoch += 1
        return epoch, int(self._given(epoch, size).sum())

    def _buckets_of_epoch(self, epoch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Each batch's bucket, and its number among the bucket's batches of this epoch."""
        batches = self._given(epoch + 1, size) - self._given(epoch, size)
        labels = np.repeat(np.arange(len(batches), dtype=np.int16), batches)
        np.random.default_rng((self.seed, 0, epoch)).shuffle(labels)
        order = np.argsort(labels, kind="stable")
        starts = np.cumsum(batches) - batches
        ordinals = np.empty(len(labels), dtype=np.int32)
        ordinals[order] = np.arange(len(labels)) - np.repeat(starts, batches)
        return labels, ordinals

    def _stretch(self, bucket: int, first: int, count: int) -> list[tuple[int, int]]:
        """Samples first..first+count-1 of a bucket's stream."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            epoch, place = divmod(first + len(found), int(self.sizes[bucket]))
            window, end = self._window_at(bucket, epoch, place)
            shards, rows = self._windows(bucket, epoch, window)
            low = place - (end - len(shards))
            high = low + count - len(found)
            found += sorted(zip(shards[low:high].tolist(), rows[low:high].tolist(), strict=True))
        return found

    def _shards_of_epoch(
        self, bucket: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bucket's shards in the epoch's order, their rows, and the starts of the windows."""
        rng = np.random.default_rng((self.seed, 1, bucket, epoch))
        order = rng.permutation(len(self._shards[bucket]))
        shards, rows = self._shards[bucket][order], self._rows[bucket][order]
        starts = (np.cumsum(rows) - rows)[:: self.window]
        return shards, rows, starts

    def _rows_of_window(
        self, bucket: int, epoch: int, window: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The window's samples in their order: shards and rows."""
        shards, rows, _ = self._epochs(bucket, epoch)
        part = slice(window * self.window, (window + 1) * self.window)
        ends = np.cumsum(rows[part])
        order = np.random.default_rng((self.seed, 2, bucket, epoch, window)).permutation(ends[-1])
        shard = np.searchsorted(ends, order, "right")
        return shards[part][shard], order - (ends - rows[part])[shard]
