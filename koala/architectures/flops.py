"""The cost of a U-Net's forward pass, and the table that `koala architectures` prints."""

from __future__ import annotations

import math
from typing import Any

from koala.architectures.layout import modules, parameters
from koala.architectures.table import ARCHITECTURES, FACTOR, UNetArchitecture


def flops(arch: UNetArchitecture, height: int, width: int, tokens: int) -> int:
    """Floating-point operations of one forward pass for one image of `height` x `width` pixels.

    A multiply-add counts as two. As in `torch.utils.flop_counter`, convolutions, linear layers and
    both products of every attention are counted; norms, activations, additions and softmax are not.
    """
    sides = [(math.ceil(height / FACTOR), math.ceil(width / FACTOR))]
    while len(sides) < len(arch.widths):  # a downsampler rounds an odd side up
        sides.append((math.ceil(sides[-1][0] / 2), math.ceil(sides[-1][1] / 2)))
    positions: dict[int | str, int] = {i: h * w for i, (h, w) in enumerate(sides)}
    positions |= {"text": tokens, "vector": 1}
    total = 0
    for module in modules(arch):
        n = positions[module.at]
        if module.attends:
            keys = n if module.attends == "self" else tokens
            total += 2 * 2 * n * keys * module.bias
        elif len(module.weight) > 1:
            total += 2 * n * math.prod(module.weight)
    return total


def table() -> list[dict[str, Any]]:
    """One row per architecture, as `koala architectures` prints; JSON-serialisable."""
    rows = []
    for arch in ARCHITECTURES.values():
        count, side = parameters(arch), arch.sample * FACTOR
        rows.append(
            {
                "name": arch.name,
                "parameters": count,
                "fp32_checkpoint_gb": round(4 * count / 1e9, 4),
                "depths": list(arch.depths),
                "up_depths": [list(stage) for stage in arch.up],
                "mid": arch.mid,
                "native_pixels": side,
                "tflop": round(flops(arch, side, side, arch.tokens) / 1e12, 6),
            }
        )
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `table()` as aligned text for the terminal, with a heading."""
    head = ("U-Net", "parameters", "fp32 GB", "Tx blocks, DW", "mid", "pixels", "TFLOP a forward")
    mids = {None: "none", 0: "one resnet"}
    cells = [head] + [
        (
            row["name"],
            f"{row['parameters']:,}",
            f"{row['fp32_checkpoint_gb']:#.3g}",
            str(row["depths"]).replace(" ", ""),
            mids.get(row["mid"], f"yes ({row['mid']})"),
            str(row["native_pixels"]),
            f"{row['tflop']:#.3g}",
        )
        for row in rows
    ]
    sizes = [max(len(line[i]) for line in cells) for i in range(len(head))]
    right = (False, True, True, False, False, True, True)
    lines = [
        "  ".join(
            cell.rjust(n) if r else cell.ljust(n)
            for cell, n, r in zip(line, sizes, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)
