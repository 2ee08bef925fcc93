"""Rounding to 4 bits by what a layer sees (GPTQ, arXiv 2210.17323, in the form of QuIP's LDLQ).

Letters: o outputs and i inputs of a layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from koala.checkpoints.quantised import GROUP
from koala.generation.quantise import packed, scale_of, whole

DAMPING = 0.1  # of the mean second moment, added to each


@torch.no_grad()
def calibrated(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of a weight [o, ...] in 4 bits, in the form of `quantise.quantised`.

    factor: L [i, i] in float64, the lower Cholesky factor of the inputs' second moments H. What
    rounding adds to the layer's output is tr(E H E^T) = |E L|^2, E [o, i] being what the weights
    lose. Columns are rounded from the last to the first, and each is moved before so that it makes
    up for those behind it: column j of E L is E_j L_jj + sum over k > j of E_k L_kj. A group's
    scale is the best for what would make up for those behind it without rounding.
    """
    exact = weight.double().flatten(1)
    lost = torch.zeros_like(exact)
    inputs = exact.shape[1]
    groups = -(-inputs // GROUP)
    numbers = torch.zeros(len(exact), groups, GROUP)
    scale = torch.empty(len(exact), groups, 1, dtype=weight.dtype)
    for group in reversed(range(groups)):
        a, b = group * GROUP, min(inputs, (group + 1) * GROUP)
        own, behind = factor[a:b, a:b], lost[:, b:] @ factor[b:, a:b]
        moved = torch.linalg.solve_triangular(own, behind, upper=False, left=False)
        best = F.pad((exact[:, a:b] + moved).float(), (0, GROUP - (b - a)))
        scale[:, group] = scale_of(best, weight.dtype)
        for j in reversed(range(b - a)):
            sum_j = behind[:, j] + lost[:, a + j + 1 : b] @ own[j + 1 :, j]
            aim_j = exact[:, a + j] + sum_j / own[j, j]
            rounded = whole(aim_j.float()[:, None], scale[:, group])
            numbers[:, group, j] = rounded[:, 0]
            lost[:, a + j] = exact[:, a + j] - (rounded * scale[:, group].double())[:, 0]
    return packed(numbers), scale
