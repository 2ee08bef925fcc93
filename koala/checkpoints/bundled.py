"""The models that ship with the package."""

from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "bundled"


def bundled_names() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))
