"""The ways to draw one model that are compared: stock diffusers, ours, ours approximated."""

from dataclasses import dataclass, replace

from koala.architectures.layout import parameters
from koala.benchmark.cases import Subject
from koala.generation.decode import TINY
from koala.generation.runtime.backends import SMALL
from koala.generation.validation import ROUNDED, default_backend
from koala.utils.device import has_bf16
from koala.utils.extras import absent

STOCK, DEFAULT, PYTORCH = "diffusers", "koala", "koala torch"


@dataclass(frozen=True)
class Way:
    """How an image is drawn."""

    name: str
    exact: bool = True  # what stock diffusers draws, but for the rounding of the same dtype
    backend: str | None = None  # of ours; None: what a person gets without asking
    decode: str | None = None  # of ours: "tiny"
    guidance_until: float = 1.0
    compiled: bool = False
    graphs: bool = False


def ways_of(
    chosen: Subject,
    on_cpu: bool,
    backend: str | None = None,
    compiled: bool = False,
    graphs: bool = False,
) -> list[Way]:
    """Stock diffusers first, then ours: as asked, or by default and by what can be asked for."""
    found = [Way(STOCK)]
    if backend or compiled or graphs:
        parts = (DEFAULT, backend or "", "compiled" * compiled, "graphs" * graphs)
        exact = backend not in (*ROUNDED, "fastest")
        name = " ".join(part for part in parts if part)
        return [*found, Way(name, exact, backend, compiled=compiled, graphs=graphs)]
    found.append(Way(DEFAULT))
    cut = [Way("koala guided half way", False, guidance_until=0.5)]
    if on_cpu:
        if default_backend() != "torch":  # else PyTorch is what a person gets anyway
            found.append(Way(PYTORCH, backend="torch"))
        if has_bf16():
            small = parameters(chosen.architecture) <= SMALL
            engine = "openvino" if small and not absent("openvino", "openvino") else "torch"
            rounded = Way(f"koala {engine}-bf16", False, f"{engine}-bf16")
            found.append(rounded)
            both = f"{rounded.name} guided half way"
            cut.append(replace(rounded, name=both, guidance_until=0.5))
    if chosen.case.guidance > 1:
        found += cut
    if chosen.folder is not None and (chosen.folder / TINY).is_dir():
        found.append(Way("koala tiny decode", False, decode="tiny"))
    return found
