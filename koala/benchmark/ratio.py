"""How many times as fast, from pairs: the median ratio, its interval, and what may be said of it.

The interval is that of order statistics: it holds for any distribution of independent pairs, is
not moved by a pair that another program disturbed, and needs six pairs before it exists.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
FEWEST = 6  # pairs for an interval of that confidence
NARROW = 0.05  # width of an interval, as a share of the median, that is good enough


@dataclass(frozen=True)
class Ratio:
    """Seconds of the one divided by seconds of the other."""

    median: float
    low: float | None  # None: too few pairs for an interval of 95 %
    high: float | None
    pairs: int

    @property
    def narrow(self) -> bool:
        """Whether more pairs would hardly change it."""
        if self.low is None or self.high is None:
            return False
        return self.high - self.low < NARROW * self.median

    def verdict(self) -> str:
        """ "faster", "slower", or "cannot be told" where the interval includes 1."""
        if self.low is not None and self.low > 1:
            return "faster"
        if self.high is not None and self.high < 1:
            return "slower"
        return "cannot be told"

    def text(self) -> str:
        """Such as "2.52 (2.48 to 2.57)"."""
        interval = "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.median:.2f}{interval}"


def ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """The ratio of pairs: the i-th of `one` was measured beside the i-th of `other`."""
    pairs = sorted(a / b for a, b in zip(one, other, strict=True))
    rank = _rank(len(pairs))
    low, high = (None, None) if rank is None else (pairs[rank], pairs[-1 - rank])
    return Ratio(statistics.median(pairs), low, high, len(pairs))


def _rank(pairs: int) -> int | None:
    """The largest k so that the median lies between the k-th smallest and the k-th largest.

    Counted from 0, with a probability of at least `CONFIDENCE` (binomial, p = 1/2).
    """
    outside, found = 0.0, None
    for k in range(pairs // 2):
        outside += 2 * math.comb(pairs, k) / 2**pairs
        if outside > 1 - CONFIDENCE:
            break
        found = k
    return found
