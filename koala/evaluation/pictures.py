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
_GENEVAL = re.compile(r"(?:.*/)?(\d+)/samples/(\d+)", re.DOTALL)


def matched(folder: Path, prompts: PromptSet) -> list[list[Path]]:
    """The pictures of each prompt, as many of each: [prompts][pictures].

    A picture belongs to the prompt whose id is its path in the folder without the suffix, its
    name, or its name before -N or _N; or whose text is that (as T2I-CompBench names them); or in
    GenEval's layout, NNNNN/samples/N. UserError for a prompt without a picture, or with fewer than
    others.
    """
    ids = _Ids(prompts.prompts)
    found: dict[int, list[tuple[int, Path]]] = defaultdict(list)
    files = image_files(folder)
    for file in files:
        place = file.relative_to(folder).with_suffix("").as_posix()
        if (belongs := ids.of(place)) is not None:
            found[belongs[0]].append((belongs[1], file))
    for i, prompt in enumerate(prompts.prompts):
        if i not in found:
            raise UserError(
                f"{folder} has no picture of the prompt {prompt.id!r} ({_short(prompt)}): name "
                f"pictures by the prompts' ids, such as {prompt.id}.png or {prompt.id}_1.png; "
                f"there is {files[0].relative_to(folder)}"
            )
    counts = {i: len(files) for i, files in found.items()}
    fewest, most = min(counts, key=lambda i: counts[i]), max(counts.values())
    if counts[fewest] < most:
        raise UserError(
            f"{folder} has {counts[fewest]} pictures of the prompt "
            f"{prompts.prompts[fewest].id!r} and {most} of others: give as many of each"
        )
    return [[file for _, file in sorted(found[i])] for i in range(len(prompts.prompts))]


class _Ids:
    """Finds the prompt that a picture's place means, and its number among the prompt's pictures."""

    def __init__(self, prompts: Sequence[Prompt]):
        self.by_id = {prompt.id: i for i, prompt in enumerate(prompts)}
        self.by_text = {_as_name(prompt.text): i for i, prompt in enumerate(prompts)}
        numbers = [(int(one.id), i) for i, one in enumerate(prompts) if one.id.isdecimal()]
        self.by_number = dict(numbers)
        if len(self.by_number) < len(numbers):  # 7 and 07
            self.by_number = {}

    def of(self, place: str) -> tuple[int, int] | None:
        of_geneval = _GENEVAL.fullmatch(place)
        if of_geneval and (found := self._by_id(of_geneval[1])) is not None:
            return found, int(of_geneval[2])
        for whole in (place, place.rpartition("/")[2]):
            if (found := self._by_id(whole)) is not None:
                return found, 0
            if numbered := _NUMBERED.fullmatch(whole):
                if (found := self._by_id(numbered[1])) is None:
                    found = self.by_text.get(_as_name(numbered[1]))
                if found is not None:
                    return found, int(numbered[2])
        return None

    def _by_id(self, name: str) -> int | None:
        """By the id, or if that is a number by its value: 7, 0007."""
        found = self.by_id.get(name)
        return self.by_number.get(int(name)) if found is None and name.isdecimal() else found


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
