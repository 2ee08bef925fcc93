"""The text of a model card: front matter with all its facts, and what a reader wants to know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from koala.checkpoints.card_facts import SECTIONS, ModelCard, Trained, calibrated_on
from koala.checkpoints.sampling import USUAL, Sampling

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

SHOWN = 12  # of a list
_PAPER = "[KOALA](https://arxiv.org/abs/2312.04005)"


def front_matter(card: ModelCard) -> ModelCardData:
    """What the Hub shows, and the card's facts under `koala`."""
    from huggingface_hub import ModelCardData

    facts = {name: getattr(card, name) for name in SECTIONS}
    known = {name: asdict(value) for name, value in facts.items() if value}
    tags = ["koala", "stable-diffusion-xl", "text-to-image"]
    return ModelCardData(
        license=card.licence.identifier,
        license_name=card.licence.name,
        license_link=card.licence.link,
        base_model=card.base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags + (["distillation"] if card.trained and card.trained.distilled else []),
        koala=json.loads(json.dumps({"title": card.title, **known})),
    )


def text(card: ModelCard, where: str = ".", drawn: Sampling = USUAL) -> str:
    """The complete file.

    where: the folder or Hub id that its snippets load. drawn: what the model is made for.
    """
    sections = (
        f"# {card.title}\n\n{_about(card)}",
        _use(where, drawn, card),
        _making(card),
        _evaluation(card),
        _limits(card),
        _licence(card),
    )
    return f"---\n{front_matter(card).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


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
    if card.trained and card.trained.further:
        grown = "grown from that" if card.trained.grown else "that"
        return f"{kind}, its U-Net {grown} of {card.trained.further}, trained further."
    return f"{kind}, {'trained from scratch' if card.trained else 'of unrecorded origin'}."


def _use(where: str, drawn: Sampling, card: ModelCard) -> str:
    koala = f"""With koala:

```sh
koala generate "a red fox" --model {where} --steps {drawn.steps} --guidance {drawn.guidance:g}
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
    asked = f"guidance_scale={drawn.guidance:g}, num_inference_steps={drawn.steps}"
    drawing = f'image = pipe("a red fox", {asked}).images[0]'
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
{drawing}
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
        seen = f"{'on' if p.latents else 'while drawing'} {calibrated_on(p.prompts, p.latents)}"
        parts.append(
            "Then heads, channels and groups of channels were removed, chosen by what their loss "
            f"costs {seen}, and the layers after them fitted anew."
        )
    if q := card.quantised:
        seen = calibrated_on(q.prompts, q.latents)
        by = f", calibrated on {seen}" if seen else ""
        parts.append(
            f"Then the U-Net of {q.model} was stored in {q.weights}, without training{by}."
        )
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
    if t.student or t.further or (t.tuned and t.before):
        seen = f"{t.before:,} samples" if t.before else "an unrecorded number of samples"
        earlier = f"- trained further from: {t.student or t.further or t.teacher}, after {seen}\n"
    parts = [
        f"- recipe: {recipe}\n"
        f"{earlier}"
        f"- samples seen: {samples}\n"
        f"- data: {t.data['pictures']:,} captioned training images, prepared with",
        _json(_shortened(data)),
        "All settings of the recipe:",
        _json(t.settings),
    ]
    return "\n\n".join(parts)


def _shortened(data: Mapping[str, Any]) -> dict[str, Any]:
    """With the beginning of each long list; the front matter has all of it."""
    return {
        key: [*value[:SHOWN], f"and {len(value) - SHOWN} more"]
        if isinstance(value, list) and len(value) > SHOWN + 1
        else value
        for key, value in data.items()
    }


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
