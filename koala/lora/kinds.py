"""Kinds of adapters: what each adds to a weight, from its factors.

    LoRA, LoCon   up @ down, or up @ mid @ down (arXiv 2106.09685; LyCORIS, arXiv 2309.14859)
    LoHa          (w1_a @ w1_b) * (w2_a @ w2_b), elementwise (arXiv 2108.06098)
    LoKr          w1 (x) w2, the Kronecker product, each whole or factored (arXiv 2212.10650)
    difference    the change itself
    DoRA          any of these, and each row of the sum scaled to a stored norm (arXiv 2402.09353)

Factors are named by their role, a value of `names.ROLES`. Letters: o out, i in, r and s ranks,
k and l the kernel's sides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
KINDS = ("LoRA", "LoHa", "LoKr", "difference")
_NEEDED = {  # kind -> roles, of each tuple at least one
    "LoRA": (("down",), ("up",)),
    "LoHa": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "LoKr": (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"),
             ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
    "difference": (("diff",),),
}  # fmt: skip
NORMS = ("magnitude", "dora_scale")  # of a DoRA, as PEFT and as LyCORIS store them
NUMBERS = ("alpha", "scalar")  # beside the factors, of one number each
_OPTIONAL = {  # kind -> roles that it may have besides
    "LoRA": ("mid",),
    "LoHa": ("hada_t1", "hada_t2"),
    "LoKr": ("lokr_t2",),
    "difference": (),
}


def kind_of(roles: Collection[str]) -> str:
    """The kind that factors of these roles make; "" if some are missing or of another kind."""
    for kind, needed in _NEEDED.items():
        known = {
            *(role for either in needed for role in either),
            *_OPTIONAL[kind],
            *NORMS,
            *NUMBERS,
        }
        whole = all(any(role in roles for role in either) for either in needed)
        if whole and known.issuperset(roles):
            return kind
    return ""


def rank_of(shapes: Mapping[str, Shape]) -> int | None:
    """The rank that alpha is divided by; None if no factor has one."""
    if "down" in shapes:
        return shapes["down"][0] if shapes["down"] else 0
    for role in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if role in shapes:
            return shapes[role][0] if shapes[role] else 0
    return None


def fits(shapes: Mapping[str, Shape], weight: Shape) -> bool:
    """Whether factors of these shapes change a weight of that shape; `NUMBERS` must be ones."""
    kind, (out, inner, *kernel) = kind_of(shapes), weight
    rank, area = rank_of(shapes), math.prod(kernel)
    if rank == 0 or any(math.prod(shapes.get(role, ())) != 1 for role in NUMBERS):
        return False
    if any(math.prod(shapes[role]) not in (out, inner) for role in NORMS if role in shapes):
        return False
    if kind == "difference":
        return _flat(shapes["diff"]) == _flat(weight)
    if kind == "LoRA":
        assert rank
        mid = shapes.get("mid")
        down = (rank, inner) if mid else (rank, inner, *kernel)
        return (
            _flat(shapes["down"]) == _flat(down)
            and _flat(shapes["up"]) == (out, rank)
            and mid in (None, (rank, rank, *kernel))
        )
    if kind == "LoHa":
        return all(
            _factored(shapes, f"hada_w{n}", f"hada_t{n}", kernel) == (out, inner * area)
            for n in (1, 2)
        )
    first, second = (
        _flat(shapes[f"lokr_w{n}"])
        if f"lokr_w{n}" in shapes
        else _factored(shapes, f"lokr_w{n}", f"lokr_t{n}", kernel)
        for n in (1, 2)
    )
    if first is None or second is None or len(first) != 2:
        return False
    return (first[0] * second[0], first[1] * math.prod(second[1:])) == (out, inner * area)


def _factored(
    shapes: Mapping[str, Shape], name: str, core: str, kernel: Collection[int]
) -> Shape | None:
    """Rows and columns of a factored matrix; None if its factors do not go together."""
    first, second = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if len(first) != 2 or len(second) != 2:
        return None
    if core not in shapes:
        return (first[0], second[1]) if first[1] == second[0] else None
    if shapes[core] != (first[0], second[0], *kernel):
        return None
    return (first[1], second[1] * math.prod(kernel))


def _flat(shape: Shape) -> Shape:
    """A 1x1 kernel as a matrix."""
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def change(factors: Mapping[str, Tensor], weight: Shape) -> Tensor:
    """What the factors add to a weight of that shape, without alpha and scale."""
    import torch

    kind = kind_of(factors)
    if kind == "difference":
        found = factors["diff"]
    elif kind == "LoRA":
        found = product(factors["down"], factors["up"], factors.get("mid"))
    elif kind == "LoHa":
        found = _matrix(factors, "hada_w1", "hada_t1") * _matrix(factors, "hada_w2", "hada_t2")
    else:
        first, second = (
            factors[f"lokr_w{n}"]
            if f"lokr_w{n}" in factors
            else _matrix(factors, f"lokr_w{n}", f"lokr_t{n}")
            for n in (1, 2)
        )
        second = second.contiguous()
        found = torch.kron(first.reshape(*first.shape[:2], *[1] * (second.dim() - 2)), second)
    return found.reshape(weight)


def product(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """up @ down, or up @ mid @ down, as one weight [o, i, k, l] or [o, i]."""
    import torch

    if mid is not None and mid.dim() == 2:
        return up.flatten(1) @ mid @ down.flatten(1)
    if mid is not None:
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _matrix(factors: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """a @ b, or with a core (Tucker decomposition) the kernel [o, i, k, l]."""
    import torch

    first, second = factors[f"{name}_a"], factors[f"{name}_b"]
    if core not in factors:
        return first @ second
    return torch.einsum("rskl,ro,si->oikl", factors[core], first, second)


def renormalised(weight: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """A DoRA's weight: the changed weight, scaled to its stored norms.

    The norms are of the rows (of each output), or, in LyCORIS' older files, of the columns.
    Without norms, the weight itself.
    """
    import torch

    norms = next((factors[role] for role in NORMS if role in factors), None)
    if norms is None:
        return weight
    by_output = "magnitude" in factors or norms.shape[0] == weight.shape[0]
    kept = 0 if by_output else 1
    axes = [axis for axis in range(weight.dim()) if axis != kept]
    norms = norms.reshape([-1 if axis == kept else 1 for axis in range(weight.dim())])
    return weight * (norms / torch.linalg.vector_norm(weight, dim=axes, keepdim=True))
