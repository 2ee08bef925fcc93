"""The model card (README.md of a model folder): what the model is, its origin, how to use it.

The card's facts are stored in its front matter, under `koala`, and the text is generated from them
alone. So training extends the card of the student it started from, and an evaluation can be added
later. The licence is the teacher's, read from its card or from the metadata of its single file;
it is "unknown" if neither names one.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from koala.checkpoints import card_text
from koala.checkpoints.card_facts import (
    SECTIONS,
    Compressed,
    Licence,
    ModelCard,
    Pruned,
    Quantised,
    Trained,
)
from koala.checkpoints.sampling import USUAL, Sampling, of_config
from koala.checkpoints.validate import read_json, read_small
from koala.errors import UserError
from koala.utils.atomic import write_text

FILE = "README.md"
_FRONT_MATTER = 200_000  # characters, the most that is read
RUN_FOLDERS = ("model", "start")  # of a run: the result, and the student before distillation
_HUB_LICENCES = (  # the Hub's identifiers
    "openrail++", "openrail", "creativeml-openrail-m", "apache-2.0", "mit", "cc0-1.0",
    "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0",
)  # fmt: skip
_TITLES = {  # other names of these licences
    "creativeml open rail++-m license": "openrail++",
    "creativeml open rail++-m": "openrail++",
    "creativeml open rail-m": "creativeml-openrail-m",
}


def write(card: ModelCard, folder: Path) -> None:
    """Writes README.md into `folder`."""
    write_text(folder / FILE, card_text.text(card, drawn=drawn_with(folder)))


def drawn_with(folder: Path) -> Sampling:
    """What the model in a folder is made for."""
    file = folder / "scheduler" / "scheduler_config.json"
    return (of_config(read_json(file)) if file.is_file() else None) or USUAL


# --- reading --------------------------------------------------------------------------------


def name_of(model: str | Path) -> str:
    """A model's name on a card: a Hub id or bundled name unchanged, a path's last part.

    The result of a run, RUN/model, is called RUN. Local paths never appear on a card.
    """
    path = Path(model).expanduser()
    if isinstance(model, str) and not path.exists():
        return model
    path = path.absolute()
    name = path.stem if path.suffix == ".safetensors" else path.name
    return path.parent.name if name in RUN_FOLDERS else name


def read(folder: Path) -> ModelCard:
    """The card of a model folder; an empty one if it has none.

    Of cards not written by koala, only licence and base model are read. UserError if the front
    matter cannot be read, since its licence would be lost.
    """
    title, file = name_of(folder), folder / FILE
    if not file.is_file():
        return ModelCard(title)
    from yaml import YAMLError

    try:
        data = _front_matter(read_small(file))
        found = data.get("koala", {})
        base = data.get("base_model")
        return ModelCard(
            title=found.get("title", title),
            licence=_licence_in(data),
            base_model=base if isinstance(base, str) else None,
            ours="koala" in data,
            **{k: kind(**found[k]) for k, kind in SECTIONS.items() if k in found},
        )
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError, YAMLError) as error:
        raise UserError(
            f"{file}: its front matter cannot be read ({str(error)[:300]}); fix it, or remove the "
            "file if its licence need not be carried over"
        ) from error


def _front_matter(content: bytes) -> dict[str, Any]:
    """What is between the first two lines of dashes. Raises `ValueError` or `YAMLError`.

    A few lines of YAML can stand for billions of values by references to themselves: none are
    allowed.
    """
    import yaml

    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(?:\n|$)", content.decode("utf-8"), re.DOTALL)
    if found is None:
        return {}
    text = found[1]
    if len(text) > _FRONT_MATTER:
        raise ValueError(f"it has {len(text):,} characters, allowed are {_FRONT_MATTER:,}")
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise ValueError("it refers to parts of itself")
    data = yaml.safe_load(text)
    if not isinstance(data, dict):
        raise ValueError("it is no mapping of names to values")
    return data


def _licence_in(data: Mapping[str, Any]) -> Licence:
    keys = ("license", "license_name", "license_link")
    values = [data.get(key) for key in keys]
    if odd := [k for k, v in zip(keys, values, strict=True) if not isinstance(v, str | None)]:
        raise ValueError(f"{odd[0]} is {data[odd[0]]!r}; it must be a string")
    identifier, name, link = values
    return Licence(identifier or "unknown", name, link)


def read_metadata(file: Path, metadata: Mapping[str, str]) -> ModelCard:
    """The card of a single file, from its safetensors metadata (`modelspec.license`).

    A licence that the Hub does not list is "other", with its title as name.
    """
    title = metadata.get("modelspec.license", "").strip()
    known = _TITLES.get(title.lower(), title.lower())
    if not title:
        return ModelCard(name_of(file))
    if known in _HUB_LICENCES:
        return ModelCard(name_of(file), Licence(known))
    link = title if re.match(r"https?://\S+$", title) else None
    return ModelCard(name_of(file), Licence("other", title, link))


def of_contents(source: Path, metadata: Mapping[str, str]) -> ModelCard:
    """The model card of a folder, or of a single file by its metadata."""
    return read(source) if source.is_dir() else read_metadata(source, metadata)


def student_of(teacher: ModelCard, name: str, title: str, cut: Compressed) -> ModelCard:
    """The card of a compressed model: the teacher's licence, and how it was compressed."""
    base = "/".join(name.split("/")[:2]) if "/" in name else teacher.base_model  # not its file
    return ModelCard(title, teacher.licence, base, cut, assembled=teacher.assembled)


def pruned_of(card: ModelCard, name: str, title: str, pruned: Pruned) -> ModelCard:
    """The card of a pruned model: that of the model it was, and the pruning."""
    base = "/".join(name.split("/")[:2]) if "/" in name else card.base_model
    return replace(card, title=title, base_model=base, pruned=pruned, evaluated=None, ours=True)


def quantised_of(card: ModelCard, title: str, stored: Quantised) -> ModelCard:
    """The card of a model whose U-Net is stored in fewer bits."""
    return replace(card, title=title, quantised=stored, evaluated=None, ours=True)


def adopted_of(student: ModelCard, teacher: ModelCard, title: str) -> ModelCard:
    """The card of a student's U-Net with a teacher's VAE and text encoders: both licences."""
    licence = _both(student.licence, teacher.licence)
    return replace(student, title=title, licence=licence, evaluated=None, ours=True)


def _both(unet: Licence, rest: Licence) -> Licence:
    if unet == rest:
        return unet
    stated = [
        (of.name or of.identifier) + (f", {of.link}" if of.link else "") for of in (unet, rest)
    ]
    return Licence("other", f"U-Net: {stated[0]}; VAE and text encoders: {stated[1]}")


def trained_of(start: ModelCard, title: str, trained: Trained) -> ModelCard:
    """The card of a trained model: the card it started from, and the training."""
    return replace(start, title=title, trained=trained, evaluated=None, ours=True)
