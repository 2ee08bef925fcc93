"""Second moments of what a layer sees, and what is computed of them, in little memory.

SDXL's largest are of 11,520 inputs, which is 1 GB in float64: two matrices of a size are there at
once, never three.

Letters: o outputs and i inputs of a layer, n rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from koala.errors import UserError

DAMPING = 1e-3  # of the mean second moment, added to each
MOST_INPUTS = 12_000  # of a layer whose moments are taken: two matrices of its size are 2.3 GB
ROWS = 512  # of a large matrix that are moved at a time


@dataclass
class Moments:
    """Of a layer's inputs less `shift` over all rows, in float64: sums [i] and products [i, i].

    Of the products those right of the diagonal are enough.

    Rounding to float32 hides what a removal costs: inputs of one module are nearly dependent, and
    may differ little from their mean, which `shift` is near.
    """

    rows: int
    shift: Tensor  # [i]
    total: Tensor  # [i]
    products: Tensor  # [i, i]

    @classmethod
    def about(cls, rows: Tensor) -> Moments:
        """Of no rows yet, about the mean of these [n, i]."""
        shift = rows.mean(0).double()
        products = shift.new_zeros(len(shift), len(shift))
        return cls(0, shift, torch.zeros_like(shift), products)

    @property
    def mean(self) -> Tensor:
        return self.shift + self.total / self.rows

    def add(self, rows: Tensor) -> None:
        """Rows [n, i] in float32."""
        rows = rows - self.shift.float()
        self.rows += len(rows)
        self.total += rows.sum(0)
        for a in range(0, rows.shape[1], ROWS):  # what is left of the diagonal is the same
            self.products[a : a + ROWS, a:] += rows[:, a : a + ROWS].T @ rows[:, a:]

    def covariance(self) -> tuple[Tensor, Tensor]:
        """H [i, i], damped so that it has an inverse, and its lower Cholesky factor.

        H takes the place of the products. UserError for inputs that are not finite.
        """
        h = self._symmetric()
        h.addr_(self.total, self.total, alpha=-1 / self.rows)
        return h, _damped(h, DAMPING)

    def about_zero(self, damping: float) -> Tensor:
        """The lower Cholesky factor [i, i] of the inputs' second moments about zero, damped.

        damping: of the mean second moment. The products are gone. UserError as of `covariance`.
        """
        h = self._symmetric()
        h.addr_(self.shift, self.total).addr_(self.total, self.shift)
        h.addr_(self.shift, self.shift, alpha=self.rows)
        factor = _damped(h, damping)
        self.products = self.products.new_zeros(0, 0)
        return factor

    def _symmetric(self) -> Tensor:
        """The products, on both sides of the diagonal."""
        h = self.products
        for a in range(0, len(h), ROWS):
            h[a + ROWS :, a : a + ROWS] = h[a : a + ROWS, a + ROWS :].T
        return h


def _damped(h: Tensor, share: float) -> Tensor:
    """The lower Cholesky factor of H, to whose diagonal that share of its mean is added, or more.

    More where rows of float32 ask for it.
    """
    damping = share * h.diagonal().mean() + torch.finfo(h.dtype).tiny
    h.diagonal().add_(damping)
    if not damping.isfinite():
        raise UserError("the U-Net computes NaN or infinite values from what it is calibrated on")
    factor, failed = torch.linalg.cholesky_ex(h)
    while failed:
        h.diagonal().add_(9 * damping)
        damping = 10 * damping
        factor, failed = torch.linalg.cholesky_ex(h)
    return factor


class Seen:
    """What a layer's fit needs: the mean of its inputs, and in a file their covariance H."""

    def __init__(self, mean: Tensor, h: Tensor, file: Path) -> None:
        """Writes `file`."""
        self.file, self.mean = file, mean
        with file.open("wb") as stream:
            for a in range(0, len(h), ROWS):
                h[a : a + ROWS, a:].contiguous().numpy().tofile(stream)

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """(a, the rows from a on of H, from column a on: it is symmetric)."""
        n = len(self.mean)
        with self.file.open("rb") as stream:
            for a in range(0, n, ROWS):
                rows, width = min(ROWS, n - a), n - a
                yield a, torch.from_numpy(np.fromfile(stream, count=rows * width)).view(rows, width)

    def fitted(self, whole: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [o, columns] nearest to those of all inputs [o, i], and what the bias gains [o].

        By least squares: W H_:c H_cc^-1.
        """
        cross, among = torch.zeros_like(whole), whole.new_zeros(len(columns), len(columns))
        for a, rows in self._rows():
            b = a + len(rows)
            cross[:, a:] += whole[:, a:b] @ rows
            cross[:, a:b] += whole[:, b:] @ rows[:, b - a :].T
            first, end, width = (int((columns < at).sum()) for at in (a, b, len(self.mean)))
            among[first:end, first:width] = rows[columns[first:end] - a][:, columns[first:] - a]
        if not len(columns):
            return whole[:, :0], whole @ self.mean
        factor = torch.linalg.cholesky(among, upper=True)
        cut = torch.cholesky_solve(cross[:, columns].T, factor, upper=True).T
        return cut, whole @ self.mean - cut @ self.mean[columns]


def inverse_of(factor: Tensor) -> Tensor:
    """H^-1 of H's Cholesky factor."""
    inverse = torch.cholesky_inverse(factor)
    return inverse if inverse.is_contiguous() else inverse.mT  # it is symmetric


def spilled(moments: Moments, file: Path) -> tuple[Seen, Tensor]:
    """What the fits need, and H^-1. No more than two matrices [i, i] are there at once."""
    h, factor = moments.covariance()
    seen = Seen(moments.mean, h, file)
    del h
    moments.products = factor[:0]
    return seen, inverse_of(factor)


def principal(square: Tensor, left: Tensor) -> Tensor:
    """square[left][:, left] of ascending `left`, in the memory of `square`."""
    k, flat = len(left), square.view(-1)
    for a in range(0, k, ROWS):  # never behind a row that is yet to be read
        part = square[left[a : a + ROWS]][:, left]
        flat[a * k : a * k + part.numel()] = part.flatten()
    return flat[: k * k].view(k, k)
