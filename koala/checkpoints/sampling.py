"""How a model is meant to be sampled: steps, guidance and sampler, known from the model itself.

Base models and their students are drawn in many guided steps; distilled ones in few steps without
guidance, and look burnt with it. A folder states it in its scheduler's config under a private key,
which diffusers leaves alone; public few-step models are known by their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koala.checkpoints.validate import read_json
from koala.errors import UserError
from koala.utils.atomic import write_text
from koala.utils.counted import counted

KEY = "_koala_sampling"  # in scheduler/scheduler_config.json


@dataclass(frozen=True)
class Sampling:
    """What a model is drawn with unless something else is asked for."""

    steps: int = 10
    guidance: float = 3.5  # up to 1: none
    scheduler: str = "euler"

    @property
    def guided(self) -> bool:
        """Whether it is made for classifier-free guidance."""
        return self.guidance > 1

    @property
    def few_steps(self) -> bool:
        """Whether it is made for few steps, so that more of them do not help."""
        return self.steps < USUAL.steps

    def text(self) -> str:
        """In words: "4 steps without guidance"."""
        return _in_words(self.steps, self.guidance)

    def note(self, steps: int, guidance: float) -> str | None:
        """A line about steps or guidance that it was not made for; None for others."""
        burnt = guidance > 1 and not self.guided
        if not burnt and not (self.few_steps and steps > self.steps):
            return None
        return f"the model was made for {self.text()}, not for {_in_words(steps, guidance)}"

    def to_config(self) -> dict[str, Any]:
        """The entry of a scheduler's config."""
        return {KEY: asdict(self)}

    def state_in(self, folder: Path) -> None:
        """Writes the entry into a model folder's scheduler."""
        file = folder / "scheduler" / "scheduler_config.json"
        config = read_json(file) | self.to_config()
        write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


USUAL = Sampling()  # KOALA's own (arXiv 2312.04005, section 5)
_UNGUIDED = 1.0

# Few-step models, by a word of their name; a number of steps in the name, as in "4step", wins.
# Their authors' settings: arXiv 2402.13929, 2311.17042, 2404.13686, 2405.14867, 2310.04378.
_FAMILIES: tuple[tuple[str, Sampling], ...] = (
    (r"lightning", Sampling(4, _UNGUIDED)),
    (r"turbo", Sampling(4, _UNGUIDED)),
    (r"hyper-?sd(?:xl)?", Sampling(8, _UNGUIDED)),
    (r"dmd2", Sampling(4, _UNGUIDED, "lcm")),
    (r"lcm", Sampling(4, _UNGUIDED, "lcm")),
)
_STEPS = re.compile(r"(\d{1,2})[ _-]?steps?\b", re.IGNORECASE)


def of_config(config: Mapping[str, Any]) -> Sampling | None:
    """What a scheduler's config states; None if it states nothing. UserError for nonsense."""
    if KEY not in config:
        return None
    match config[KEY]:
        case {"steps": int(steps), "guidance": int() | float() as guidance, "scheduler": str(name)}:
            if 1 <= steps <= 1000 and 0 <= guidance <= 100:
                return Sampling(steps, float(guidance), name)
    raise UserError(
        f"{KEY} of the scheduler's config is {config[KEY]!r}: it states steps, guidance and "
        "scheduler, or is left out"
    )


def of_model(model: str | Path, folder: Path) -> Sampling:
    """`of_named` for a model and the folder that it is in."""
    return of_named(str(model), read_json(folder / "scheduler" / "scheduler_config.json"))


def of_named(name: str, config: Mapping[str, Any]) -> Sampling:
    """What a model is drawn with: as its scheduler's config says, else its name, else as usual."""
    return of_config(config) or by_name(name) or USUAL


def by_name(name: str) -> Sampling | None:
    """What a public few-step model of that name or file is made for; None for any other name.

    KOALA's own students are named after their teachers, and are drawn in ten guided steps.
    """
    name = (Path(name).name if Path(name).exists() else name).lower()
    if "koala" in name:
        return None
    for word, sampling in _FAMILIES:
        if re.search(rf"(?<![a-z]){word}(?![a-z])", name.replace("_", "-")):
            steps = _STEPS.search(name.replace("_", " "))
            return Sampling(
                int(steps[1]) if steps else sampling.steps, sampling.guidance, sampling.scheduler
            )
    return None


def _in_words(steps: int, guidance: float) -> str:
    guided = f"with guidance {guidance:g}" if guidance > 1 else "without guidance"
    return f"{counted(steps, 'step')} {guided}"
