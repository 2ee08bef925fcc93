"""The prompt sets that people compare on, read from local copies in their own published layouts.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from koala.errors import UserError, unknown
from koala.evaluation.prompts import Prompt, PromptSet, checked, read_file
from koala.utils.asset_packages import cache_folder
from koala.utils.extras import require
from koala.utils.records import load_json, records, text_of

ILLUSTRATIONS = 200  # prompts of the illustrations, unless another number is asked for


@dataclass(frozen=True)
class Published:
    """A published set: the file that tells it, relative to its folder, and how it is read."""

    marks: tuple[str, ...]  # any of them is there
    read: Callable[[Path], PromptSet]  # the folder, or the file itself
    at: str  # where its authors publish it
    several: bool = False  # files: its folder means it, and each file alone is a list of prompts


def read_prompts(given: str) -> PromptSet:
    """The prompts that `--prompts` names.

    given: a file (`koala.evaluation.prompts.read_file`), a folder of prepared data, whose held-out
        captions it means, or a published set: its folder or file, which is recognised, NAME=PATH,
        or NAME alone, which means `sets/NAME` in koala's cache.

    UserError if it is none of these, or holds no prompts.
    """
    name, equals, place = given.partition("=")
    if equals and name in SETS:
        return _published(name, Path(place).expanduser())
    path = Path(given).expanduser()
    if given in SETS and not path.exists():
        return _published(given, cache_folder() / "sets" / given)
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise UserError(
                f"--prompts {given} does not exist: give a file or folder that is there"
            )
        raise unknown(
            "prompts", given, SETS, ", a file with one prompt to a line, csv, json or parquet, or "
            "a folder of prepared data",
        )  # fmt: skip
    for name, published in SETS.items():
        if _marked(published, path):
            return _read(name, path)
    if is_prepared(path):
        require("prepared data", "evaluate", "pyarrow")
        from koala.data.held_out import held_out_captions

        rows = held_out_captions(path)
        return checked(PromptSet(path.name, tuple(Prompt(id, text) for id, text in rows)))
    if path.is_dir():
        raise UserError(
            f"{path} is no prompt set: allowed are {', '.join(SETS)} in their published layouts, "
            "prepared data, or a text, csv, json or parquet file"
        )
    return read_file(path)


def is_prepared(folder: Path) -> bool:
    """Whether it is a folder of latents or pixels that `koala prepare` wrote, whole or not."""
    return (folder / "latents.json").is_file()


def _published(name: str, path: Path) -> PromptSet:
    published = SETS[name]
    if not _marked(published, path):
        raise UserError(
            f"{name} is not at {path} ({' or '.join(published.marks)} is missing): get it from "
            f"{published.at} and give --prompts {name}=PATH"
        )
    return _read(name, path)


def _read(name: str, path: Path) -> PromptSet:
    """UserError if the files are not in the set's layout."""
    published = SETS[name]
    try:
        return checked(published.read(path))
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not in the layout of {name} ({type(error).__name__}: {error}): get it from "
            f"{published.at}"
        ) from None


def _marked(published: Published, path: Path) -> bool:
    if path.is_dir():
        return any((path / mark).is_file() for mark in published.marks)
    named = path.is_file() and any(path.match(mark) for mark in published.marks)
    return named and not published.several


def _file(path: Path, published: str) -> Path:
    """The file itself, or the one of the set's marks that the folder has."""
    if path.is_file():
        return path
    return next(path / mark for mark in SETS[published].marks if (path / mark).is_file())


# --- layouts --------------------------------------------------------------------------------


def hpsv2(path: Path) -> PromptSet:
    """Human Preference Score v2 (arXiv 2306.09341): 800 prompts in each of four styles."""
    styles = ("anime", "concept-art", "paintings", "photo")
    prompts: list[Prompt] = []
    for style in styles:
        of_style = read_file(path / f"{style}.json").prompts
        prompts += [replace(p, id=f"{style}/{p.id}", category=style) for p in of_style]
    return PromptSet("hpsv2", tuple(prompts), metrics=("hpsv2.1",), by_category=True)


def compbench(path: Path) -> PromptSet:
    """T2I-CompBench (arXiv 2307.06350): the six categories of its first version, 300 prompts each.

    A complex prompt is scored by which relations it has: the authors list those with spatial ones
    and those with actions in two more files.
    """
    folder = _file(path, "t2i-compbench").parent
    kinds = {
        _plain(prompt.text): kind
        for kind in ("spatial", "action")
        if (folder / f"complex_val_{kind}.txt").is_file()
        for prompt in read_file(folder / f"complex_val_{kind}.txt").prompts
    }
    prompts: list[Prompt] = []
    for category in ("color", "shape", "texture", "spatial", "non_spatial", "complex"):
        for p in read_file(folder / f"{category}_val.txt").prompts:
            kind = kinds.get(_plain(p.text), "both") if category == "complex" else category
            prompts.append(Prompt(f"{category}/{p.id}", p.text, category, {"relation": kind}))
    return PromptSet("t2i-compbench", tuple(prompts), 10, ("compbench",), by_category=True)


def _plain(text: str) -> str:
    return text.partition(".")[0].lower()


def geneval(path: Path) -> PromptSet:
    """GenEval (arXiv 2310.11513): 553 prompts with the objects that a detector should find."""
    rows = read_file(_file(path, "geneval")).prompts
    prompts = (replace(p, category=str(p.facts.get("tag", ""))) for p in rows)
    return PromptSet("geneval", tuple(prompts), 4, ("geneval",), by_category=True)


def geneval2(path: Path) -> PromptSet:
    """GenEval 2 (arXiv 2512.16853): 800 prompts with questions, by the number of their atoms."""
    rows = read_file(_file(path, "geneval2")).prompts
    prompts = (
        Prompt(p.id, p.text, f"{p.facts['atom_count']} atoms", {"questions": p.facts["vqa_list"]})
        for p in rows
    )
    return PromptSet("geneval2", tuple(prompts), metrics=("soft-tifa-gm", "soft-tifa-am"))


def dpg_bench(path: Path) -> PromptSet:
    """DPG-Bench (arXiv 2403.05135): 1,065 long prompts, each with questions that build on others.

    The authors' program leaves out the table's first question; here it is asked.
    """
    file = _file(path, "dpg-bench")
    texts: dict[str, str] = {}
    questions: dict[str, list[dict[str, object]]] = {}
    for _, row in records(file, "item_id"):
        if row["text"].strip():
            texts[row["item_id"]] = row["text"].strip()
        after = [int(n) for n in row["dependency"].split(",") if n.strip() not in ("", "0")]
        questions.setdefault(row["item_id"], []).append(
            {
                "number": int(row["proposition_id"]),
                "question": row["question_natural_language"],
                "after": after,
            }
        )
    prompts = (
        Prompt(id, texts.get(id, ""), "", {"propositions": asked})
        for id, asked in questions.items()
    )
    return PromptSet("dpg-bench", tuple(prompts), 4, ("dpg",))


def parti(path: Path) -> PromptSet:
    """PartiPrompts (arXiv 2206.10789): 1,632 prompts in twelve categories."""
    prompts = read_file(_file(path, "partiprompts")).prompts
    return PromptSet("partiprompts", prompts, metrics=("clip-score", "pickscore"))


def mjhq(path: Path) -> PromptSet:
    """MJHQ-30K (arXiv 2402.17245): 3,000 pictures with prompts in each of ten categories."""
    file = _file(path, "mjhq-30k")
    rows = load_json(text_of(file), str(file))
    prompts = (Prompt(id, row["prompt"], row["category"]) for id, row in rows.items())
    return PromptSet("mjhq-30k", tuple(prompts), metrics=("fid", "clip-score"))


def coco(path: Path) -> PromptSet:
    """COCO captions (arXiv 1504.00325): the first caption of every image.

    An id is the image's file name without its suffix, so that a folder of the images fits.
    """
    file = _file(path, "coco")
    found = load_json(text_of(file), str(file))
    names = {image["id"]: Path(image["file_name"]).stem for image in found["images"]}
    first: dict[str, str] = {}
    for one in sorted(found["annotations"], key=lambda a: a["id"]):
        first.setdefault(names[one["image_id"]], " ".join(one["caption"].split()))
    prompts = (Prompt(name, first[name]) for name in names.values() if name in first)
    return PromptSet("coco", tuple(prompts), metrics=("fid", "clip-score"))


def _below(folder: str, names: Sequence[str]) -> tuple[str, ...]:
    """The files by their names, and in the folder of the authors' repository that has them."""
    return (*names, *(f"{folder}/{name}" for name in names))


SETS: dict[str, Published] = {
    "hpsv2": Published(
        ("concept-art.json",), hpsv2,
        "https://huggingface.co/datasets/zhwang/HPDv2, benchmark/", several=True,
    ),
    "t2i-compbench": Published(
        _below("examples/dataset", ["color_val.txt"]), compbench,
        "https://github.com/Karine-Huang/T2I-CompBench, examples/dataset/", several=True,
    ),
    "geneval": Published(
        _below("prompts", ["evaluation_metadata.jsonl"]), geneval,
        "https://github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl",
    ),
    "geneval2": Published(
        ("geneval2_data.jsonl",), geneval2, "https://github.com/facebookresearch/GenEval2"
    ),
    "dpg-bench": Published(
        _below("dpg_bench", ["dpg_bench.csv"]), dpg_bench,
        "https://github.com/TencentQQGYLab/ELLA, dpg_bench/",
    ),
    "partiprompts": Published(
        ("PartiPrompts.tsv",), parti, "https://github.com/google-research/parti"
    ),
    "mjhq-30k": Published(
        ("meta_data.json",), mjhq, "https://huggingface.co/datasets/playgroundai/MJHQ-30K"
    ),
    "coco": Published(
        _below(
            "annotations",
            ["captions_val2014.json", "captions_val2017.json", "captions_train2014.json"],
        ),
        coco, "https://cocodataset.org, annotations",
    ),
}  # fmt: skip
