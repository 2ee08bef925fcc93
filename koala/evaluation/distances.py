"""Frechet and kernel distances (KID, CMMD) between two sets of feature vectors, in float64.

Letters: n, m vectors in the sets a, b; d their width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]  # [n, d], [m, d] -> [n, m]
ROWS = 2048  # of a kernel matrix that are there at once


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians with the samples' means and covariances.

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))   (Heusel et al. 2017, eq. 6)

    With S_a = A^T A and S_b = B^T B, the last trace is the sum of the singular values of A B^T,
    which is exact also for fewer than d vectors, whose covariances are singular. Fewer vectors give
    a larger distance: compare sets of equal n only.

    Args:
        a, b: float [n, d] and [m, d], n and m at least 2.
    """
    a, b = _checked(a, b)
    root_a, root_b = _root(a), _root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + root_a.square().sum() + root_b.square().sum() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor, size: int, subsets: int = 100) -> float:
    """Kernel distance (KID): squared MMD, unbiased, kernel k(x, y) = (x.y / d + 1)^3.

    The mean over random subsets (Binkowski et al. 2018, section 4 and eq. 4). Being unbiased, it
    is near 0 for two sets of one distribution, and can be slightly negative.

    Args:
        a, b: float [n, d] and [m, d].
        size: vectors in a subset, drawn without replacement; at least 2, and all where there are
          fewer.
        subsets: their number.
    """
    size = min(size, len(a), len(b))
    assert size >= 2, (size, len(a), len(b))
    generator = torch.Generator().manual_seed(0)  # the same subsets for every row of a report
    total = 0.0
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        total += squared_mmd(x, y, polynomial)
    return total / subsets


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel, (x.y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_mmd(a: Tensor, b: Tensor, kernel: Kernel, unbiased: bool = True) -> float:
    """The squared maximum mean discrepancy of two whole sets (Gretton et al. 2012, eqs. 3 and 5).

    unbiased: pairs of a vector with itself are left out; with them (CMMD's) it is never negative.
    """
    return float(_mmd_without(a, b, np.zeros(len(a), int), kernel, unbiased)[0])


def kernel_left_out(
    a: Tensor, b: Tensor, groups: np.ndarray, kernel: Kernel, unbiased: bool = True
) -> np.ndarray:
    """The squared MMD without each group of a. groups: int [n], numbers from 0."""
    return _mmd_without(a, b, groups, kernel, unbiased)[1:]


def _mmd_without(
    a: Tensor, b: Tensor, groups: np.ndarray, kernel: Kernel, unbiased: bool
) -> np.ndarray:
    """The squared MMD of all, then without each group: from the kernel's sums between groups."""
    a, b = _checked(a, b)
    member = torch.nn.functional.one_hot(torch.from_numpy(groups)).double()  # [n, g]
    ones = torch.ones(len(b), 1, dtype=torch.float64)
    within = _sums(a, a, member, member, kernel)  # [g, g]
    across = _sums(a, b, member, ones, kernel)[:, 0]  # [g]
    alone = member.T @ _own(a, kernel)  # [g]
    real = _sums(b, b, ones, ones, kernel)[0, 0] - _own(b, kernel).sum() * unbiased
    sizes = member.sum(0)

    def value(inside: Tensor, itself: Tensor, between: Tensor, n: Tensor) -> Tensor:
        pairs = n * (n - 1) if unbiased else n * n
        of_real = len(b) * (len(b) - 1) if unbiased else len(b) ** 2
        own = (inside - itself * unbiased) / pairs
        return own + real / of_real - 2 * between / (n * len(b))

    whole = value(within.sum(), alone.sum(), across.sum(), sizes.sum())
    rest = value(
        within.sum() - within.sum(0) - within.sum(1) + within.diagonal(),
        alone.sum() - alone,
        across.sum() - across,
        sizes.sum() - sizes,
    )
    return torch.cat([whole[None], rest]).numpy()


def _sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, kernel: Kernel) -> Tensor:
    """of_x^T k(x, y) of_y, a few rows of the kernel matrix at a time."""
    parts = zip(x.split(ROWS), of_x.split(ROWS), strict=True)
    return sum((of.T @ (kernel(part, y) @ of_y) for part, of in parts), torch.tensor(0.0).double())


def _own(x: Tensor, kernel: Kernel) -> Tensor:
    """[n] the kernel of each vector with itself."""
    few = x.split(64)  # most of what is computed of them is left out
    return torch.cat([kernel(part, part).diagonal() for part in few])


def _root(x: Tensor) -> Tensor:
    """R [min(n, d), d] with R^T R = the covariance of x [n, d] (divided by n - 1)."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    assert a.ndim == b.ndim == 2, (a.shape, b.shape)
    assert a.shape[1] == b.shape[1], (a.shape, b.shape)
    assert min(len(a), len(b)) >= 2, "a covariance needs two vectors"
    a, b = a.double(), b.double()
    assert torch.cat([a, b]).isfinite().all(), "features must be finite"
    return a, b
