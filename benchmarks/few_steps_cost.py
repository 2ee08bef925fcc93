"""GPU-hours of the recipes of students in few steps, by the dry run's arithmetic.

`python -m benchmarks.few_steps_cost` prints the table of `docs/few-steps.md`. Nothing in it is
measured: GPUs are assumed to reach `koala.recipes.gpus.SHARE` of their peak.
"""

from koala.architectures.table import get
from koala.recipes import few_steps, gpus
from koala.recipes.flops import per_sample
from koala.utils import markdown

CARDS = {"a100": 4, "4090": 1}  # how many


def table() -> str:
    """A row for each recipe: passes of the U-Net, samples, cost."""
    header = ["recipe", "passes an image", "samples", "TFLOP a sample"]
    header += [f"{card}-hours" for card in CARDS]
    header += [f"days on {number} x {card}" for card, number in CARDS.items()]
    rows = []
    for name, preset in few_steps.PRESETS.items():
        recipe = few_steps.student(name)
        arch = get(preset.of)
        flops, again = per_sample(
            arch, arch, recipe.settings, recipe.training, recipe.pixels or arch.sample * 8
        )
        flops += again if recipe.hardware.checkpointing else 0
        hours = {
            card: recipe.training.samples * flops / (gpus.SHARE * gpus.get(card).tflops * 1e12)
            / 3600
            for card in CARDS
        }  # fmt: skip
        days = (f"{hours[card] / 24 / number:.1f}" for card, number in CARDS.items())
        rows.append([
            f"`{name}`", preset.steps, f"{recipe.training.samples:,}", f"{flops / 1e12:.1f}",
            *(f"{hours[card]:,.0f}" for card in CARDS), *days,
        ])  # fmt: skip
    return markdown.table(header, rows)


if __name__ == "__main__":
    print(table())
