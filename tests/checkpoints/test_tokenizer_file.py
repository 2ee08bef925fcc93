"""Tokenizers read in two parts: equal to what their libraries read."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from koala.checkpoints.bundled import bundled_folder
from koala.checkpoints.load import _tokenizer_of_parts, load_text
from koala.checkpoints.tokenizer_file import FILE, Reader

TEXTS = ("A red fox!", "zwei grüne  Äpfel", "<|endoftext|> !", "a\nfox's 12 🦊", "")
BOTH = ("tokenizer", "tokenizer_2")


@pytest.fixture(params=["bundled", "toy"])
def folder(request, toy_sdxl):
    return bundled_folder("koala-mini") if request.param == "bundled" else toy_sdxl


def test_both_are_their_librarys(folder):
    reader = Reader()
    for name in BOTH:
        ours = _tokenizer_of_parts(folder / name, reader)
        theirs = CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
        assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        assert ours.special_tokens_map == theirs.special_tokens_map
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length"):
            assert getattr(ours, key) == getattr(theirs, key)
        assert len(ours) == len(theirs)
        for text in TEXTS:
            assert ours(text).input_ids == theirs(text).input_ids
            assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert len(reader._models) == 1  # which both share


def test_what_they_write_is_read_again(folder, tmp_path):
    for tokenizer in load_text(folder)[:2]:
        tokenizer.save_pretrained(tmp_path)
        again = _tokenizer_of_parts(tmp_path, Reader())
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def copied(folder, to, change=lambda file: None, **config):
    """A tokenizer's folder with a changed file and more in its config."""
    to.mkdir()
    content = json.loads((folder / FILE).read_text("utf-8"))
    change(content)
    (to / FILE).write_text(json.dumps(content), "utf-8")
    kept = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (to / "tokenizer_config.json").write_text(json.dumps(kept | config))
    return to


def model_first(content):
    rest = dict(content)
    content.clear()
    content["model"] = rest.pop("model")
    content.update(rest)


def one_more_token(content):
    token = {
        **content["added_tokens"][-1],
        "id": len(content["model"]["vocab"]),
        "content": "<new>",
    }
    content["added_tokens"].append(token)


def truncated(content):
    content["truncation"] = {
        "direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip


ODD = {
    "model first": (model_first, {}),
    "one more token": (one_more_token, {}),
    "truncated": (truncated, {}),
    "another suffix": (lambda content: content["model"].update(end_of_word_suffix="</e>"), {}),
    "no special token": (lambda content: content.update(added_tokens=[]), {}),
    "another key": (lambda content: None, {"split_special_tokens": True}),
}


@pytest.mark.parametrize("odd", ODD)
def test_folders_of_another_kind_are_left_to_their_library(toy_sdxl, tmp_path, odd):
    change, config = ODD[odd]
    folder = copied(toy_sdxl / "tokenizer", tmp_path / "odd", change, **config)
    assert _tokenizer_of_parts(folder, Reader()) is None
    if odd != "another key":
        ours, theirs = Reader().tokenizer(folder / FILE), Tokenizer.from_file(str(folder / FILE))
        assert ours.to_str() == theirs.to_str()
        for text in TEXTS:
            assert ours.encode(text).ids == theirs.encode(text).ids


def test_a_folder_with_more_files_is_left_to_its_library(toy_sdxl, tmp_path):
    folder = copied(toy_sdxl / "tokenizer", tmp_path / "more")
    assert _tokenizer_of_parts(folder, Reader()) is not None
    (folder / "added_tokens.json").write_text("{}")
    assert _tokenizer_of_parts(folder, Reader()) is None
