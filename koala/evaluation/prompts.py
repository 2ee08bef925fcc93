"""The prompts of an evaluation: from text files and tables, prepared data, and published sets.

Importing this loads no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from koala.errors import UserError
from koala.generation.prompt_syntax import escaped
from koala.utils.digest import digest
from koala.utils.records import TABLES, lines_of, records, text_of

TEXT = ("prompt", "text", "caption", "prompts")  # columns or keys with it, the first there
NAMED = ("id", "category")  # and what else is read by name
_COMMENT = re.compile(r"#(?:\s|$)")  # of a text file; `#1 fan` is a prompt


@dataclass(frozen=True)
class Prompt:
    """A text to draw. `facts`: what the metrics of its set ask about the picture."""

    id: str
    text: str
    category: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def literal(self) -> str:
        """The text as a prompt that is drawn word for word."""
        return escaped(self.text)


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are drawn and scored together.

    images: pictures of each prompt that the set's authors draw. metrics: those that the authors
    report. by_category: whether their score is the mean over the categories' means.
    """

    name: str
    prompts: tuple[Prompt, ...]
    images: int = 1
    metrics: tuple[str, ...] = ()
    by_category: bool = False

    @property
    def digest(self) -> str:
        """A hash of the prompts, in their order."""
        return digest([[p.id, p.text, p.category, p.facts] for p in self.prompts])

    @property
    def categories(self) -> list[str]:
        """Their names, in the order of the prompts; none if there is but one."""
        found = list(dict.fromkeys(prompt.category for prompt in self.prompts))
        return found if len(found) > 1 else []

    def first(self, count: int | None) -> PromptSet:
        """So many prompts, chosen by the hash of the id, in their order; None for all.

        UserError if there are fewer.
        """
        if count is None:
            return self
        if count > len(self.prompts):
            raise UserError(
                f"{count} prompts requested, but {self.name} has {len(self.prompts)}: use a "
                "smaller --count, or leave it out for all"
            )
        by_hash = sorted(self.prompts, key=lambda p: sha256(p.id.encode()).digest())
        chosen = {prompt.id for prompt in by_hash[:count]}
        return replace(self, prompts=tuple(p for p in self.prompts if p.id in chosen))


def checked(given: PromptSet) -> PromptSet:
    """The set itself. UserError if it is empty, a prompt is, or an id occurs twice."""
    if not given.prompts:
        raise UserError(f"{given.name} has no prompts: give a file with one to a line")
    seen: set[str] = set()
    for prompt in given.prompts:
        if not prompt.text.strip():
            raise UserError(f"{given.name}: the prompt {prompt.id!r} is empty")
        if prompt.id in seen:
            raise UserError(f"{given.name}: two prompts have the id {prompt.id!r}; rename one")
        seen.add(prompt.id)
    return given


def read_file(path: Path) -> PromptSet:
    """The prompts of a text file (one to a line), csv, tsv, jsonl, json or parquet file.

    A file without an ending is a text.
    Columns or keys: `prompt` (or text, caption, prompts), and if there are, `id`, `category`, and
    what metrics ask for, such as `questions`. Blank lines of a text file are left out, and those
    that are `#` or begin with `# `. UserError for another file, or one that cannot be read.
    """
    suffix = path.suffix.lower()
    rows: list[tuple[str, Any]]
    if suffix in ("", ".txt"):
        lines = (line.strip() for _, line in lines_of(text_of(path)))
        rows = [("", line) for line in lines if not _COMMENT.match(line)]
    elif suffix in TABLES:
        rows = [*records(path, "id")]
    else:
        raise UserError(
            f"the prompts {path}: allowed are files that end in .txt, {', '.join(TABLES)}, a "
            "folder of prepared data, or a published set"
        )
    read = [prompt_of(row, i, path, where) for i, (where, row) in enumerate(rows)]
    return checked(PromptSet(path.stem, tuple(read)))


def texts_in(path: Path) -> list[str]:
    """The prompts of a file as `read_file` reads it, to be drawn as they are.

    UserError for one that says more of them, which would be ignored.
    """
    path = path.expanduser()
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} is no file: give a text with a prompt a line")
    given = read_file(path).prompts
    if other := next((name for prompt in given for name in prompt.facts), None):
        raise UserError(f"{path}: the column {other!r} has no effect here: leave it out")
    return [prompt.text for prompt in given]


def prompt_of(row: Any, number: int, path: Path, where: str = "") -> Prompt:
    """A prompt from a text or from named values. UserError if it has none; `where` names it."""
    if isinstance(row, str):
        return Prompt(f"{number:05d}", row)
    if not isinstance(row, Mapping):
        raise UserError(f"{path} holds {row!r:.80}: allowed are texts and objects with a prompt")
    named = {str(key).strip().lower(): value for key, value in row.items() if key is not None}
    key = next((name for name in TEXT if isinstance(named.get(name), str)), None)
    if key is None:
        raise UserError(
            f"{path}: {where or f'row {number + 1}'} has no prompt; name its column one of "
            f"{', '.join(TEXT)} (it has {', '.join(named) or 'nothing'})"
        )
    facts = {k: v for k, v in named.items() if k not in (key, *NAMED) and v is not None}
    category = "" if named.get("category") is None else str(named["category"])
    id = named.get("id")
    own = f"{number:05d}" if id is None or id == "" else str(id)
    return Prompt(own, named[key].strip(), category, facts)


def write(prompts: Sequence[Prompt]) -> str:
    """The prompts as jsonl, which `read_file` reads again."""
    rows = ({"id": p.id, "prompt": p.text, "category": p.category, **p.facts} for p in prompts)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
