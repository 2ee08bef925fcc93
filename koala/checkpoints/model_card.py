"""The model card (README.md of a model folder): what the model is, its origin, how to use it.

The card's facts are stored in its front matter, under `koala`, and the text is generated from them
alone. So training extends the card of the student it started from, and an evaluation can be added
later. The licence is the teacher's, read from its card or from the metadata of its single file;
it is "unknown" if neither names one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.checkpoints.validate import read_small
from koala.errors import UserError
from koala.utils.atomic import write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

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


@dataclass(frozen=True)
class Licence:
    """A model's licence, in the Hub's terms."""

    identifier: str = "unknown"  # in the Hub's list; "other" with a name and a link
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
    inherited: int  # teacher tensors that the student inherits
    dropped: int  # teacher tensors that it does not inherit
    depth_rule: str
    predicts: str = "epsilon"  # "v" for v-prediction, with ", zero terminal SNR" if so


@dataclass(frozen=True)
class Pruned:
    """What `koala compress --prune` did to the U-Net."""

    model: str
    before: int  # parameters
    after: int
    prompts: int  # that it was calibrated on
    latents: int = 0  # prepared ones that it was calibrated on, in place of prompts


@dataclass(frozen=True)
class Quantised:
    """What `koala convert --weights` did to the U-Net."""

    model: str
    weights: str  # how they are stored


@dataclass(frozen=True)
class Assembled:
    """What a model was put together from, `koala.lora.assembly`."""

    unet: str
    base: str | None  # of what the U-Net's file lacks
    vae: str | None
    loras: list[str]  # merged: name:scale


@dataclass(frozen=True)
class Trained:
    """What `koala distill` or `koala finetune` did."""

    recipe: str  # its name
    settings: dict[str, Any]  # the whole recipe
    samples: dict[str, int]  # what was trained -> samples it has seen
    data: dict[str, Any]  # "pictures" to train on, and what the prepared folder says of itself
    teacher: str | None  # of its VAE and text encoders; None: trained from scratch
    distilled: bool  # some loss compares with that teacher
    student: str | None = None  # whose U-Net it went on from; None: the teacher's, cut
    before: int = 0  # samples that student had seen, according to its card
    grown: str | None = None  # the cut that the U-Net was grown from, `koala.checkpoints.grow`
    tuned: bool = False  # by `koala finetune`, from the U-Net of `teacher` itself


@dataclass(frozen=True)
class Evaluated:
    """What `koala evaluate` measured."""

    table: str  # Markdown: the real images' row and the model's
    settings: dict[str, Any]
    hardware: str


@dataclass(frozen=True)
class ModelCard:
    """All that is known of a model; None: unknown."""

    title: str
    licence: Licence = field(default_factory=Licence)
    base_model: str | None = None  # Hub id of the model that it derives from
    cut: Compressed | None = None
    trained: Trained | None = None
    evaluated: Evaluated | None = None
    ours: bool = True  # False: not written by koala
    assembled: Assembled | None = None
    pruned: Pruned | None = None
    quantised: Quantised | None = None

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
        """The complete file. where: the folder or Hub id that its snippets load."""
        sections = (
            f"# {self.title}\n\n{_about(self)}",
            _use(where, self),
            _making(self),
            _evaluation(self),
            _limits(self),
            _licence(self),
        )
        return f"---\n{self.metadata().to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"

    def write(self, folder: Path) -> None:
        """Writes README.md into `folder`."""
        write_text(folder / FILE, self.text())


_PAPER = "[KOALA](https://arxiv.org/abs/2312.04005)"
_FACTS = {
    "cut": Compressed,
    "assembled": Assembled,
    "trained": Trained,
    "evaluated": Evaluated,
    "pruned": Pruned,
    "quantised": Quantised,
}


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
            **{k: kind(**found[k]) for k, kind in _FACTS.items() if k in found},
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


def quantised_of(card: ModelCard, name: str, title: str, weights: str) -> ModelCard:
    """The card of a model whose U-Net is stored in fewer bits."""
    stored = Quantised(name, weights)
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


# --- text -----------------------------------------------------------------------------------


def _about(card: ModelCard) -> str:
    kind = "A text-to-image pipeline in the Stable Diffusion XL family"
    if p := card.pruned:
        share = 1 - p.after / p.before
        return (
            f"{kind}: **{p.model}** with {share:.0%} of its U-Net's parameters pruned, without "
            f"training ({p.before:,} before, {p.after:,} now)."
        )
    if c := card.cut:
        share = c.parameters / c.teacher_parameters
        since = "not trained"
        if card.trained:
            since = "then distilled" if card.trained.distilled else "then trained without a teacher"
            since = f"fine-tuned from {card.trained.teacher}" if card.trained.tuned else since
        return (
            f"{kind}, compressed with {_PAPER}'s method: the "
            f"U-Net of **{c.teacher}** ({c.teacher_architecture}, {c.teacher_parameters:,} "
            f"parameters) cut to **{c.architecture}** ({c.parameters:,}, {share:.0%}), {since}."
        )
    if card.trained and card.trained.student:
        return (
            f"{kind}, compressed with {_PAPER}'s method and trained further from "
            f"{card.trained.student}."
        )
    if card.trained and card.trained.tuned:
        return f"{kind}, fine-tuned from {card.trained.teacher}."
    if card.trained and card.trained.grown:
        return f"{kind}, its U-Net grown from that of {card.trained.grown} and trained further."
    return f"{kind}, {'trained from scratch' if card.trained else 'of unrecorded origin'}."


def _use(where: str, card: ModelCard) -> str:
    koala = f"""With koala:

```sh
koala generate "a red fox" --model {where} --steps 10 --guidance 3.5
```"""
    if card.quantised:
        return f"""## Use

{koala}

No other program loads it: its U-Net is stored in {card.quantised.weights}, in a file of koala's."""
    if card.pruned:
        return f"""## Use

{koala}

diffusers and programs that know SDXL's own widths do not load it: its modules have widths of their
own inside (`inner_widths` in `unet/config.json`)."""
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

{koala}"""


def _making(card: ModelCard) -> str:
    parts = ["## How it was made"]
    if c := card.cut:
        parts.append(
            f"The student inherits {c.inherited:,} of its teacher's U-Net tensors; {c.dropped:,} "
            f"were dropped (depth rule `{c.depth_rule}` chooses the transformer blocks that stay). "
            "Text encoders, VAE and tokenizers are the teacher's."
            + ("" if c.predicts == "epsilon" else f" The U-Net predicts {c.predicts}.")
        )
    if a := card.assembled:
        of = [
            f"the U-Net of {a.unet}",
            *([f"what that lacks of {a.base}"] if a.base else []),
            *([f"the VAE of {a.vae}"] if a.vae else []),
            *([f"merged LoRAs {', '.join(a.loras)}"] if a.loras else []),
        ]
        parts.append(f"{'The teacher' if card.cut else 'It'} was put together: {'; '.join(of)}.")
    if card.trained:
        parts.append(training_of(card.trained))
    if p := card.pruned:
        drawn = f"while {p.prompts} prompts are drawn"
        seen = f"on {p.latents} prepared latents" if p.latents else drawn
        parts.append(
            "Then heads, channels and groups of channels were removed, chosen by what their loss "
            f"costs {seen}, and the layers after them fitted anew."
        )
    if q := card.quantised:
        parts.append(f"Then the U-Net of {q.model} was stored in {q.weights}, without training.")
    if len(parts) == 1:
        parts.append("Not recorded.")
    return "\n\n".join(parts)


def training_of(t: Trained) -> str:
    """What a card says of a training."""
    samples = ", ".join(f"{what} {number:,}" for what, number in t.samples.items())
    data = {key: value for key, value in t.data.items() if key != "pictures"}
    role = "teacher" if t.distilled else "VAE and text encoders of"
    role = "fine-tuned from" if t.tuned else role
    recipe = f"`{t.recipe}`" + (f", {role} {t.teacher}" if t.teacher else "")
    earlier = ""
    if t.student or (t.tuned and t.before):
        seen = f"{t.before:,} samples" if t.before else "an unrecorded number of samples"
        earlier = f"- trained further from: {t.student or t.teacher}, after {seen}\n"
    parts = [
        f"- recipe: {recipe}\n"
        f"{earlier}"
        f"- samples seen: {samples}\n"
        f"- data: {t.data['pictures']:,} captioned training images, prepared with",
        _json(data),
        "All settings of the recipe:",
        _json(t.settings),
    ]
    return "\n\n".join(parts)


def _json(value: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(value, indent=1)}\n```"


def _evaluation(card: ModelCard) -> str:
    if (e := card.evaluated) is None:
        return "## Evaluation\n\nNot evaluated."
    settings = "; ".join(f"{name}: {value}" for name, value in e.settings.items())
    return f"""## Evaluation

{e.table}

Measured by `koala evaluate` ({settings}), on {e.hardware}. Distances are comparable only between
models evaluated with the same settings and images."""


def _limits(card: ModelCard) -> str:
    limits = []
    if card.cut and not card.trained:
        limits.append(
            "It has not been distilled, and until it is, its images are noise. It is a starting "
            "point for `koala distill`, not a model to generate with."
        )
    if card.trained:
        limits.append("It can draw what its training images (above) show; do not expect much else.")
    if card.cut or (card.trained and card.trained.student):
        limits.append(
            "According to KOALA's authors, such students struggle with long legible text, hands, "
            "and prompts with several attributes or relations."
        )
    limits.append("It is meant for research. Its images make no statement about people or events.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _licence(card: ModelCard) -> str:
    own, source = card.licence, "its teacher" if card.cut else "the model it derives from"
    if own.identifier == "unknown":
        statement = (
            f"Unknown: {source} names none. Ask its authors before you redistribute this model."
            if card.cut or not card.trained
            else "None has been stated."
        )
    else:
        statement = f"{own.name or own.identifier}, carried over from {source}"
        statement += f": {own.link}" if own.link else "."
    files = "Files named LICENSE or NOTICE, if any, hold further terms and credits."
    return f"## Licence\n\n{statement} {files}"
