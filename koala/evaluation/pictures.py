"""Pictures that are there already: which of them belongs to which prompt, and real ones.

Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from koala.errors import UserError
from koala.evaluation.models import Size, image_files
from koala.evaluation.prompts import Prompt, PromptSet
from koala.generation.image_files import open_image

_NUMBERED = re.compile(r"(.+?)[-_](\d+)", re.DOTALL)
_GENEVAL = re.compile(r"(?:.*/)?(\d{5})/samples/(\d+)", re.DOTALL)


def matched(folder: Path, prompts: PromptSet) -> list[list[Path]]:
    """The pictures of each prompt, as many of each: [prompts][pictures].

    A picture belongs to the prompt whose id is its path in the folder without the suffix, its
    name, or its name before -N or _N; or whose text is that (as T2I-CompBench names them); or in
    GenEval's layout, NNNNN/samples/N. UserError for a prompt without a picture, or with fewer than
    others.
    """
    by_id = {prompt.id: i for i, prompt in enumerate(prompts.prompts)}
    by_text = {_as_name(prompt.text): i for i, prompt in enumerate(prompts.prompts)}
    found: dict[int, list[tuple[int, Path]]] = defaultdict(list)
    for file in image_files(folder):
        place = file.relative_to(folder).with_suffix("").as_posix()
        if (belongs := _belongs(place, by_id, by_text)) is not None:
            found[belongs[0]].append((belongs[1], file))
    for i, prompt in enumerate(prompts.prompts):
        if i not in found:
            raise UserError(
                f"{folder} has no picture of the prompt {prompt.id!r} ({_short(prompt)}): name "
                f"pictures by the prompts' ids, such as {prompt.id}.png"
            )
    counts = {i: len(files) for i, files in found.items()}
    fewest, most = min(counts, key=lambda i: counts[i]), max(counts.values())
    if counts[fewest] < most:
        raise UserError(
            f"{folder} has {counts[fewest]} pictures of the prompt "
            f"{prompts.prompts[fewest].id!r} and {most} of others: give as many of each"
        )
    return [[file for _, file in sorted(found[i])] for i in range(len(prompts.prompts))]


def _belongs(place: str, by_id: dict[str, int], by_text: dict[str, int]) -> tuple[int, int] | None:
    """The prompt that a picture's place means, and its number among the prompt's pictures."""
    of_geneval = _GENEVAL.fullmatch(place)
    if of_geneval and of_geneval[1] in by_id:
        return by_id[of_geneval[1]], int(of_geneval[2])
    name = place.rpartition("/")[2]
    for whole in (place, name):
        if whole in by_id:
            return by_id[whole], 0
        if numbered := _NUMBERED.fullmatch(whole):
            number = int(numbered[2])
            if numbered[1] in by_id:
                return by_id[numbered[1]], number
            if (text := _as_name(numbered[1])) in by_text:
                return by_text[text], number
    if name.isdecimal() and f"{int(name):05d}" in by_id:
        return by_id[f"{int(name):05d}"], 0
    return None


def _as_name(text: str) -> str:
    """A prompt as file names have it: without slashes and a last period, in small letters."""
    return " ".join(re.sub(r"[/\\]", " ", text).rstrip(". ").lower().split())


def _short(prompt: Prompt) -> str:
    return prompt.text if len(prompt.text) <= 40 else prompt.text[:39] + "…"


@dataclass(frozen=True)
class RealPictures:
    """Real pictures that drawn ones are compared with.

    reference: those that distances are to. own: each prompt's, if every prompt has one. others:
    pictures outside of the reference, as many as prompts, that stand for a perfect model in it.
    digest: changes when they do.
    """

    name: str
    image: Callable[[int], Image.Image]
    reference: tuple[int, ...]
    own: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    digest: str = ""


def real_folder(folder: Path, prompts: Sequence[Prompt]) -> RealPictures:
    """All pictures of a folder, and each prompt's by its id. UserError if there are none."""
    files = image_files(folder)
    names = {file.relative_to(folder).with_suffix("").as_posix(): i for i, file in enumerate(files)}
    names |= {file.stem: i for i, file in enumerate(files)}
    own = [names.get(prompt.id) for prompt in prompts]
    paired = tuple(i for i in own if i is not None)
    return RealPictures(
        str(folder),
        lambda i: open_image(files[i]).convert("RGB"),
        tuple(range(len(files))),
        paired if len(paired) == len(own) else (),
        digest=stamp(files),
    )


def stamp(files: Sequence[Path]) -> str:
    """Changes when a file is added, removed or written again."""
    from koala.utils.digest import digest

    states = ((file, file.stat()) for file in files)
    return digest([[str(file), state.st_size, state.st_mtime_ns] for file, state in states])


def at_size(image: Image.Image, size: Size) -> Image.Image:
    """Scales a picture down to the (width, height) at which rows are compared.

    Otherwise a distance would mostly measure the resolution. Smaller images stay as they are.
    """
    image = image.convert("RGB")
    if image.width <= size[0] and image.height <= size[1]:
        return image
    return image.resize(size, Image.Resampling.LANCZOS)
