"""The model card, README.md of a model folder: what it is, where it comes from, how to use it.

Everything a card says is kept as data in its front matter, under `koala`, and the text is made of
that alone. So a distilled model's card goes on from its student's, an evaluation can be entered
later, and nothing is said that nobody recorded. The licence is the teacher's: it is read from the
teacher's own card, or from the metadata of its single file, and is "unknown" where neither names
one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.errors import UserError
from koala.utils.atomic import write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

FILE = "README.md"
RUN_FOLDERS = ("model", "start")  # of a run: its result and the student before distillation
_HUB_LICENCES = (  # the Hub's identifiers
    "openrail++", "openrail", "creativeml-openrail-m", "apache-2.0", "mit", "cc0-1.0",
    "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0",
)  # fmt: skip
_TITLES = {  # other names of these licences
    "creativeml open rail++-m license": "openrail++",
    "creativeml open rail++-m": "openrail++",
    "creativeml open rail-m": "creativeml-openrail-m",
}


@dataclass(frozen=True)
class Licence:
    """What a model may be used for, in the Hub's terms."""

    identifier: str = "unknown"  # as the Hub lists them; "other" where name and link say more
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Compressed:
    """How `koala compress` made the U-Net."""

    teacher: str
    teacher_architecture: str
    teacher_parameters: int
    architecture: str
    parameters: int
    inherited: int  # tensors that the student has from its teacher
    dropped: int  # tensors of the teacher that it has not
    depth_rule: str


@dataclass(frozen=True)
class Trained:
    """What `koala distill` did."""

    recipe: str  # its name
    settings: dict[str, Any]  # the whole recipe
    samples: dict[str, int]  # what was trained -> samples it has seen
    data: dict[str, Any]  # "pictures" to train on, and what the prepared folder says of itself
    teacher: str | None  # whose VAE and text encoders it has; None where it started from nothing
    distilled: bool  # some loss compares with that teacher
    student: str | None = None  # whose U-Net it went on from; None: the teacher's, cut
    before: int = 0  # samples that one had seen, as far as its own card says


@dataclass(frozen=True)
class Evaluated:
    """What `koala evaluate` measured."""

    table: str  # Markdown: the real pictures' row and the model's
    settings: dict[str, Any]
    hardware: str


@dataclass(frozen=True)
class ModelCard:
    """All that is known of a model; None where nothing is."""

    title: str
    licence: Licence = field(default_factory=Licence)
    base_model: str | None = None  # Hub id of the model that it was made from
    cut: Compressed | None = None
    trained: Trained | None = None
    evaluated: Evaluated | None = None
    ours: bool = True  # False: the file was written by others

    def metadata(self) -> ModelCardData:
        """The front matter."""
        from huggingface_hub import ModelCardData

        facts = {name: getattr(self, name) for name in _FACTS}
        known = {name: asdict(value) for name, value in facts.items() if value}
        tags = ["koala", "stable-diffusion-xl", "text-to-image"]
        return ModelCardData(
            license=self.licence.identifier,
            license_name=self.licence.name,
            license_link=self.licence.link,
            base_model=self.base_model,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=tags + (["distillation"] if self.trained and self.trained.distilled else []),
            koala=json.loads(json.dumps({"title": self.title, **known})),
        )

    def text(self, where: str = ".") -> str:
        """The whole file; `where` is what its snippets load: a folder or a Hub id."""
        sections = (
            f"# {self.title}\n\n{_about(self)}",
            _use(where),
            _making(self),
            _evaluation(self),
            _limits(self),
            _licence(self),
        )
        return f"---\n{self.metadata().to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"

    def write(self, folder: Path) -> None:
        """Writes README.md into `folder`, whole or not at all."""
        write_text(folder / FILE, self.text())


_PAPER = "[KOALA](https://arxiv.org/abs/2312.04005)"
_FACTS = {"cut": Compressed, "trained": Trained, "evaluated": Evaluated}


# --- reading --------------------------------------------------------------------------------


def name_of(model: str | Path) -> str:
    """What a card calls a model: a Hub id or bundled name as it is, of a path no more than a name.

    The result of a run, RUN/model, is called RUN: where things lie on a disk is nobody's business.
    """
    path = Path(model).expanduser()
    if isinstance(model, str) and not path.exists():
        return model
    path = path.absolute()
    name = path.stem if path.suffix == ".safetensors" else path.name
    return path.parent.name if name in RUN_FOLDERS else name


def read(folder: Path) -> ModelCard:
    """The card of a model folder, ours or another's; an empty one where it has none.

    Of another's card only licence and base model are taken. UserError where the front matter
    cannot be read: its licence would be lost.
    """
    title, file = name_of(folder), folder / FILE
    if not file.is_file():
        return ModelCard(title)
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        data = metadata_load(file) or {}
        found = data.get("koala", {})
        base = data.get("base_model")
        return ModelCard(
            title=found.get("title", title),
            licence=_licence_in(data),
            base_model=base if isinstance(base, str) else None,
            ours="koala" in data,
            **{k: kind(**found[k]) for k, kind in _FACTS.items() if k in found},
        )
    except (OSError, ValueError, TypeError, AttributeError, YAMLError) as error:
        raise UserError(
            f"{file}: its front matter cannot be read ({error}); mend it, or remove the file if "
            "the licence that it names need not be carried over"
        ) from error


def _licence_in(data: Mapping[str, Any]) -> Licence:
    keys = ("license", "license_name", "license_link")
    values = [data.get(key) for key in keys]
    if odd := [k for k, v in zip(keys, values, strict=True) if not isinstance(v, str | None)]:
        raise ValueError(f"{odd[0]} is {data[odd[0]]!r}, must be a string")
    identifier, name, link = values
    return Licence(identifier or "unknown", name, link)


def read_metadata(file: Path, metadata: Mapping[str, str]) -> ModelCard:
    """The card of a single file, by its safetensors metadata (the ModelSpec's `modelspec.license`).

    A licence that is not among the Hub's is "other", with its title as name.
    """
    title = metadata.get("modelspec.license", "").strip()
    known = _TITLES.get(title.lower(), title.lower())
    if not title:
        return ModelCard(name_of(file))
    if known in _HUB_LICENCES:
        return ModelCard(name_of(file), Licence(known))
    link = title if re.match(r"https?://\S+$", title) else None
    return ModelCard(name_of(file), Licence("other", title, link))


def student_of(teacher: ModelCard, name: str, title: str, cut: Compressed) -> ModelCard:
    """The card of a compressed model: the teacher's licence, and what was cut."""
    base = "/".join(name.split("/")[:2]) if "/" in name else teacher.base_model  # not its file
    return ModelCard(title, teacher.licence, base, cut)


def adopted_of(student: ModelCard, teacher: ModelCard, title: str) -> ModelCard:
    """The card of a student's U-Net beside a teacher's VAE and text encoders: both licences."""
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
    """The card of a trained model: that of the model it started from, and the training."""
    return replace(start, title=title, trained=trained, evaluated=None, ours=True)


# --- text -----------------------------------------------------------------------------------


def _about(card: ModelCard) -> str:
    kind = "A text-to-image pipeline of Stable Diffusion XL's kind"
    if c := card.cut:
        share = c.parameters / c.teacher_parameters
        since = "not trained since"
        if card.trained:
            since = "then distilled" if card.trained.distilled else "then trained without a teacher"
        return (
            f"{kind}, made small with {_PAPER}'s method: the "
            f"U-Net of **{c.teacher}** ({c.teacher_architecture}, {c.teacher_parameters:,} "
            f"parameters) cut to **{c.architecture}** ({c.parameters:,}, {share:.0%}), {since}."
        )
    if card.trained and card.trained.student:
        return (
            f"{kind}, made small with {_PAPER}'s method, that went on from {card.trained.student}."
        )
    return f"{kind}, {'trained from nothing' if card.trained else 'of unrecorded origin'}."


def _use(where: str) -> str:
    return f"""## Use

With diffusers (the folder's scheduler is Euler with trailing timesteps):

```python
import torch
from diffusers import StableDiffusionXLPipeline

gpu = torch.cuda.is_available()
pipe = StableDiffusionXLPipeline.from_pretrained(
    "{where}", torch_dtype=torch.float16 if gpu else torch.float32
)
pipe = pipe.to("cuda" if gpu else "cpu")
image = pipe("a red fox", guidance_scale=3.5, num_inference_steps=10).images[0]
image.save("fox.png")
```

With koala:

```sh
koala generate "a red fox" --model {where} --steps 10 --guidance 3.5
```"""


def _making(card: ModelCard) -> str:
    parts = ["## How it was made"]
    if c := card.cut:
        parts.append(
            f"The student started from {c.inherited:,} of its teacher's U-Net tensors; "
            f"{c.dropped:,} were left out (depth rule `{c.depth_rule}`: which transformer blocks "
            "stay). Text encoders, VAE and tokenizers are the teacher's."
        )
    if t := card.trained:
        samples = ", ".join(f"{what} {number:,}" for what, number in t.samples.items())
        data = {key: value for key, value in t.data.items() if key != "pictures"}
        role = "teacher" if t.distilled else "VAE and text encoders of"
        recipe = f"`{t.recipe}`" + (f", {role} {t.teacher}" if t.teacher else "")
        earlier = ""
        if t.student:
            seen = f"{t.before:,} samples" if t.before else "a number of samples not recorded"
            earlier = f"- went on from: {t.student}, after {seen}\n"
        parts += [
            f"- recipe: {recipe}\n"
            f"{earlier}"
            f"- samples seen: {samples}\n"
            f"- data: {t.data['pictures']:,} captioned pictures to train on, prepared with",
            _json(data),
            "All settings of the recipe:",
            _json(t.settings),
        ]
    if len(parts) == 1:
        parts.append("Not recorded.")
    return "\n\n".join(parts)


def _json(value: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(value, indent=1)}\n```"


def _evaluation(card: ModelCard) -> str:
    if (e := card.evaluated) is None:
        return "## Evaluation\n\nNot evaluated."
    settings = "; ".join(f"{name}: {value}" for name, value in e.settings.items())
    return f"""## Evaluation

{e.table}

By `koala evaluate` ({settings}), on {e.hardware}. The distances compare only with others of the
same settings and pictures."""


def _limits(card: ModelCard) -> str:
    limits = []
    if card.cut and not card.trained:
        limits.append(
            "It has not been distilled: until it is, its pictures are noise-like. It is a start "
            "for `koala distill`, not a model to draw with."
        )
    if card.trained:
        limits.append(
            "It draws what its training pictures (above) hold, and little else can be expected."
        )
    if card.cut or (card.trained and card.trained.student):
        limits.append(
            "KOALA's authors name as limits of such students: long legible text, hands, and "
            "prompts with several attributes or relations."
        )
    limits.append("For research. What it draws is no statement about people or events.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _licence(card: ModelCard) -> str:
    own, source = card.licence, "its teacher" if card.cut else "the model it was made from"
    if own.identifier == "unknown":
        said = (
            f"Unknown: {source} names none. Ask its authors before you pass this model on."
            if card.cut or not card.trained
            else "None has been stated."
        )
    else:
        said = f"{own.name or own.identifier}, carried over from {source}"
        said += f": {own.link}" if own.link else "."
    files = "Files named LICENSE or NOTICE, where there are any, hold further terms and credits."
    return f"## Licence\n\n{said} {files}"
