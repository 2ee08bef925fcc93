"""The models of KOALA's latency and memory table, with its sizes, steps and published figures.

The published figures are for one image in fp16 with stock code and PyTorch 2.1 (arXiv 2312.04005).
KOALA uses 10 steps with guidance 3.5. The paper does not state the steps of SDXL-Turbo and
SDXL-Lightning; here they use 4 steps without guidance, as their authors recommend, so compare
those rows with stock diffusers, not with the paper. PixArt is not an SDXL model and is left out.

Importing this does not load torch, so that `check` is fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from koala.architectures.table import ARCHITECTURES, FACTOR, UNetArchitecture
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.sampling import of_model
from koala.checkpoints.tensors import float_dtype
from koala.checkpoints.validate import unet_architecture
from koala.errors import UserError, did_you_mean
from koala.generation import validation
from koala.utils.atomic import check_new
from koala.utils.device import check_device
from koala.utils.threads import available_cores

GPUS = ("3060Ti 8 GB", "2080Ti 11 GB", "4090 24 GB")
BUDGETS = (8, 11, 24)  # GB of the three GPUs
OOM = None  # out of memory
ROUNDS = 60  # images of each way, unless the intervals are narrow earlier


@dataclass(frozen=True)
class Case:
    """A model and its generation settings."""

    name: str
    architecture: str  # of `koala.architectures`
    pixels: int  # a side
    steps: int
    guidance: float
    published: tuple[tuple[float, float] | None, ...] = ()  # (s, GB) by GPU

    @property
    def rows(self) -> int:
        """Batch rows of one U-Net evaluation: two with guidance."""
        return 2 if self.guidance > 1 else 1


# fmt: off
_ROWS = (
    # name                  architecture  pixels steps guidance 3060Ti     2080Ti        4090
    ("koala-turbo-700m",     "koala-700m",    512, 10, 3.5, (0.74, 5.3), (0.54, 4.7),  (0.19, 4.9)),
    ("koala-turbo-1b",       "koala-1b",      512, 10, 3.5, (0.92, 6.1), (0.66, 5.5),  (0.24, 5.7)),
    ("koala-lightning-700m", "koala-700m",   1024, 10, 3.5, (2.88, 6.8), (1.94, 8.2),  (0.66, 8.3)),
    ("koala-lightning-1b",   "koala-1b",     1024, 10, 3.5, (3.53, 7.2), (2.33, 8.9),  (0.79, 9.1)),
    ("sdxl-base-1.0",        "sdxl",         1024, 25, 7.5, OOM,         (9.65, 10.4), (3.23, 11.9)),
    ("sdxl-turbo",           "sdxl",          512,  4, 0.0, OOM,         (0.64, 8.3),  (0.24, 8.5)),
    ("sdxl-lightning",       "sdxl",         1024,  4, 0.0, OOM,         (2.05, 10.8), (0.72, 11.7)),
    ("ssd-1b",               "ssd-1b",       1024, 25, 7.5, OOM,         (6.34, 9.3),  (2.09, 9.4)),
    ("segmind-vega",         "segmind-vega", 1024, 25, 7.5, (6.75, 7.2), (4.52, 8.1),  (1.49, 8.2)),
)
# fmt: on
CASES = {row[0]: Case(*row[:5], published=row[5:]) for row in _ROWS}


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its settings."""

    case: Case
    random: bool
    folder: Path | None = None

    @property
    def architecture(self) -> UNetArchitecture:
        """The U-Net's."""
        if self.folder is None:
            return ARCHITECTURES[self.case.architecture]
        return unet_architecture(self.folder)


def subject(name: str) -> Subject:
    """A case of the published table, or a model: bundled name, folder or Hub id.

    Other models are drawn at their native size, in the steps and with the guidance that they are
    made for. UserError for unknown names.
    """
    if name in CASES:
        return Subject(CASES[name], random=True)
    try:
        folder = resolve_model(name)
    except UserError as error:
        raise UserError(f"{error}{did_you_mean(name, CASES)}") from None
    arch = unet_architecture(folder)
    pixels = arch.sample * FACTOR
    label = folder.name if Path(name).exists() else name
    meant = of_model(name, folder)
    case = Case(label, arch.name, pixels, meant.steps, meant.guidance)
    return Subject(case, random=False, folder=folder)


def check(
    names: Sequence[str],
    out: Path,
    device: str | None,
    dtype: str | None,
    rounds: int,
    backend: str | None,
    compiled: bool,
    graphs: bool,
    threads: Sequence[int],
) -> list[Subject]:
    """Checks the arguments of `benchmark`; returns the models, by default the whole table. UserError."""
    check_new(out)
    if rounds < 1:
        raise UserError(f"rounds is {rounds}: allowed are whole numbers from 1; default {ROUNDS}")
    cores = available_cores()
    for count in threads:
        if not 1 <= count <= cores:
            raise UserError(
                f"threads is {count}: allowed are 1 to {cores}, the cores that are here"
            )
    check_device(device)
    float_dtype(dtype)
    validation.runtime(backend, compiled, graphs)
    return [subject(name) for name in names or CASES]
