"""The order of samples: one bucket a batch, none lost, none twice, and no state."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from koala.data.sampler import BatchOrder, shuffled

SHARDS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=12
)  # rows, bucket, copies


def order_of(shards, seed=0, window=2) -> BatchOrder:
    """An order over shards 0, 1, ...; buckets renumbered to leave no gap."""
    copies = np.array([c for _, _, c in shards])
    rows, buckets = (np.repeat([s[i] for s in shards], copies) for i in (0, 1))
    _, buckets = np.unique(buckets, return_inverse=True)
    return BatchOrder(np.repeat(np.arange(len(shards)), copies), rows, buckets, seed, window)


@settings(deadline=None)
@given(SHARDS, st.integers(1, 7), st.integers(0, 99), st.integers(1, 4))
def test_every_batch_is_of_one_bucket_and_every_epoch_shows_all(shards, size, seed, window):
    order = order_of(shards, seed, window)
    assert order.epoch_length == sum(rows * copies for rows, _, copies in shards)
    streams: dict[int, list[tuple[int, int]]] = {}
    for number in range(3 * order.epoch_length // size + 1):
        places = order.batch(number, size)
        assert len(places) == size
        (bucket,) = {shards[shard][1] for shard, _ in places}
        streams.setdefault(bucket, []).extend(places)
    for bucket, stream in streams.items():
        once = Counter(
            {(i, r): c for i, (n, b, c) in enumerate(shards) if b == bucket for r in range(n)}
        )
        length = once.total()
        for first in range(0, len(stream) - length + 1, length):
            assert Counter(stream[first : first + length]) == once
        rest = Counter(stream[len(stream) // length * length :])
        assert rest <= once  # what the bucket has begun of its next epoch


@settings(deadline=None)
@given(SHARDS, st.integers(1, 7), st.integers(1, 6))
def test_after_an_epoch_every_bucket_lacks_less_than_a_batch(shards, size, epochs):
    order = order_of(shards)
    batches = sum(epochs * int(n) // size for n in order.sizes)
    shown = Counter(shards[order.batch(k, size)[0][0]][1] for k in range(batches))
    for bucket in {b for _, b, _ in shards}:
        samples = epochs * sum(n * c for n, b, c in shards if b == bucket)
        assert 0 <= samples - shown[bucket] * size < size


def test_a_batch_is_the_same_whatever_came_before():
    shards = [(7, b, 1) for b in (0, 1, 0, 1, 1)]
    forwards, once = order_of(shards, 3), [order_of(shards, 3).batch(n, 4) for n in range(30)]
    assert [forwards.batch(n, 4) for n in range(30)] == once
    assert [forwards.batch(n, 4) for n in reversed(range(30))] == once[::-1]
    assert [order_of(shards, 4).batch(n, 4) for n in range(30)] != once


def test_windows_mix_shards_and_epochs_differ():
    order = order_of([(50, 0, 1)] * 40, window=8)
    epoch = [place for n in range(40) for place in order.batch(n, 50)]
    following = [place for n in range(40, 80) for place in order.batch(n, 50)]
    assert epoch != following
    # A batch of 50 out of 8 shards of 50: from how many shards, if drawn at random? 7.99.
    mixed = [len({shard for shard, _ in epoch[i : i + 50]}) for i in range(0, 2000, 50)]
    assert np.mean(mixed) > 7.5


def test_a_bucket_leaves_a_window_for_good():
    order = order_of([(7, b, 1) for b in (0, 1, 0, 1, 1, 0, 0)], window=2)
    by_bucket: dict[int, list] = {}
    for number in range(60):
        windows = order.windows(number, 5)
        shards = {shard for shard, _ in order.batch(number, 5)}
        for bucket, epoch, window in windows:
            assert shards & {*order._windows(bucket, epoch, window)[0].tolist()}
        by_bucket.setdefault(windows[0][0], []).extend(windows)
    for seen in by_bucket.values():
        assert seen == sorted(seen) and len({*seen}) > 4


def test_the_simple_order_shows_everything_once_an_epoch():
    order = shuffled(10, 0, 30, seed=1)
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert shuffled(10, 7, 9, seed=1) == order[7:16]
    assert order != shuffled(10, 0, 30, seed=2)
