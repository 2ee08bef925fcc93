"""Makes a model ready to ship: weights in fp16, configs without local paths, its words, its card.

`python -m koala.mini.bundle MODEL --out koala/bundled/NAME --data DIR` makes a bundled model of one
that was trained on DIR. Parts that equal those of koala-mini, bundled before, are left out.
"""

import argparse
import filecmp
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from koala.checkpoints import model_card
from koala.checkpoints.bundled import WHOLE
from koala.checkpoints.card_facts import Licence
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.validate import CONFIGS, WEIGHTS, weights_files
from koala.checkpoints.words import FILE as WORDS
from koala.data.illustrations.words import words_of
from koala.errors import UserError
from koala.generation.decode import TINY, TINY_FILE
from koala.utils.atomic import new_folder

LICENCE = Licence(
    "apache-2.0"
)  # the project's; whom the drawings' licences credit is in NOTICE.txt
TEXTS = ("NOTICE.txt", "model_index.json")


def bundle(model: str | Path, out: Path, data: Path | None = None) -> int:
    """Writes `out`, a pipeline folder in fp16; returns the bytes of its weights.

    data: the prepared illustrations of its training, whose words are listed in the folder; None:
        the folder's own list, if it has one.
    UserError if `model` is not a model, `data` no illustrations, or `out` exists.
    """
    source = resolve_model(model)
    words = words_of(data) if data is not None else None
    if out.exists():
        raise UserError(f"{out} exists; remove it first, or take another --out")
    with new_folder(out) as part:
        for component in CONFIGS:
            (part / component).mkdir()
            for file in sorted((source / component).glob("*.json")):
                _write_config(file, part / component / file.name)
            for file in sorted((source / component).glob("*.txt")):
                shutil.copy(file, part / component)
            if component in WEIGHTS:
                for file in weights_files(source / component, component):
                    _write_half(file, part / component / file.name)
        if (source / TINY).is_dir():
            (part / TINY).mkdir()
            _write_config(source / TINY / "config.json", part / TINY / "config.json")
            _write_half(source / TINY / TINY_FILE, part / TINY / TINY_FILE)
        for name in TEXTS:
            shutil.copy(source / name, part)
        if words is not None:
            words.write(part)
        elif (source / WORDS).is_file():
            shutil.copy(source / WORDS, part)
        card = model_card.read(source)
        model_card.write(replace(card, title=out.name, licence=LICENCE), part)
        if out.name != WHOLE:
            _leave_out_shared(part, out.parent / WHOLE)
        return sum(file.stat().st_size for file in part.rglob("*.safetensors"))


def _leave_out_shared(part: Path, whole: Path) -> None:
    """Removes the components whose files are those of the family's whole member."""
    for component in sorted(path for path in part.iterdir() if path.is_dir()):
        names = [file.name for file in component.iterdir()]
        _, other, lacking = filecmp.cmpfiles(component, whole / component.name, names, False)
        if not other and not lacking:
            shutil.rmtree(component)


def _write_half(file: Path, to: Path) -> None:
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        save_file(tensors, to, metadata=opened.metadata())


def _write_config(file: Path, to: Path) -> None:
    config = json.loads(file.read_text("utf-8"))
    if file.name == "config.json":
        config.pop("_name_or_path", None)  # its "dtype" stays float32, which loaders convert to
    compact = file.name == "tokenizer.json"  # a megabyte less
    to.write_text(
        json.dumps(config, ensure_ascii=False, indent=None if compact else 2) + "\n",
        encoding="utf-8",
    )


def main(arguments: list[str] | None = None) -> int:
    """The command of this module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the illustrations that it was trained on")
    options = parser.parse_args(arguments)
    try:
        size = bundle(options.model, options.out, options.data)
    except UserError as error:
        print(f"koala: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
