"""tokenizer.json files, for the package tokenizers. Importing this loads no torch.

Nearly all of such a file is its model, words and their merges, and SDXL's two tokenizers have the
same. So a file is read in two parts, and one model serves both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.checkpoints.validate import read_small

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

FILE = "tokenizer.json"
_KEY = '"model":'
_NONE: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
}  # fmt: skip
_EMPTY = {"type": "BPE", "vocab": {}, "merges": []}


@dataclass(frozen=True)
class Parts:
    """What a file holds."""

    settings: dict[str, Any]  # without the model
    model: Any  # of `tokenizers.models`

    @property
    def added(self) -> dict[int, AddedToken]:
        """The added tokens by their ids; all are words of the model."""
        from tokenizers import AddedToken

        tokens = self.settings["added_tokens"]
        return {
            token["id"]: AddedToken(**{key: token[key] for key in token if key != "id"})
            for token in tokens
        }

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of these parts."""
        from tokenizers import Tokenizer

        bare = {**self.settings, "added_tokens": [], "model": _EMPTY}
        made = Tokenizer.from_str(json.dumps(bare))
        made.model = self.model
        for token in self.added.values():
            (made.add_special_tokens if token.special else made.add_tokens)([token])
        return made


@dataclass
class Reader:
    """Reads files. Where their models are the same text, they share one."""

    _models: dict[str, Any] = field(default_factory=dict)

    def parts(self, file: Path) -> Parts | None:
        """The parts of a file; None where they are not as tokenizers writes those of SDXL.

        That is with the model as the last key, and with no added token that is no word of it.
        Raises what tokenizers does for a model that it cannot read, and UserError as `read_small`.
        """
        head, _, text = read_small(file).decode().partition(_KEY)
        try:
            settings = json.loads(f"{head}{_KEY}null}}")
        except json.JSONDecodeError:
            return None
        if settings.keys() != {*_NONE, "model"}:
            return None
        if text not in self._models:
            self._models[text] = _model(text)
        model = self._models[text]
        tokens = settings["added_tokens"]
        known = model and all(model.token_to_id(one["content"]) == one["id"] for one in tokens)
        return Parts(settings, model) if known else None

    def tokenizer(self, file: Path) -> Tokenizer:
        """The tokenizer of a file. Raises what tokenizers raises, and UserError as `read_small`."""
        from tokenizers import Tokenizer

        parts = self.parts(file)
        return parts.tokenizer() if parts else Tokenizer.from_file(str(file))


def _model(text: str) -> Any:
    """The model that a file ends with; None if other keys follow it."""
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(f"{json.dumps(_NONE)[:-1]}, {_KEY}{text}")
    stated: list[Any] = [whole.normalizer, whole.pre_tokenizer, whole.post_processor]
    stated += [whole.decoder, whole.truncation, whole.padding]
    stated.append(whole.get_added_tokens_decoder() or None)
    return whole.model if stated == [None] * len(stated) else None
