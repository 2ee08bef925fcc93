"""Frechet and kernel distance (KID) between two sets of feature vectors, in float64.

Letters: n, m vectors in the sets a, b; d their width.
"""

import torch
from torch import Tensor


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


def kernel_distance(
    a: Tensor, b: Tensor, generator: torch.Generator, subsets: int = 100, size: int = 100
) -> float:
    """Kernel distance (KID): squared MMD, unbiased, kernel k(x, y) = (x.y / d + 1)^3.

    The mean over random subsets (Binkowski et al. 2018, section 4 and eq. 4). Being unbiased, it
    is near 0 for two sets of one distribution, and can be slightly negative.

    Args:
        a, b: float [n, d] and [m, d].
        generator: of the subsets; on the CPU.
        subsets: their number.
        size: vectors in a subset, drawn without replacement; 2 to min(n, m).
    """
    a, b = _checked(a, b)
    assert 2 <= size <= min(len(a), len(b)), (size, len(a), len(b))
    total = 0.0
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        total += _squared_mmd(x, y)
    return total / subsets


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate: pairs of a vector with itself are left out (Gretton 2012, eq. 3)."""
    n, m = len(x), len(y)
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    within_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


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
