"""The names by which prompts and requests find a folder's LoRAs."""

from pathlib import Path

import pytest

from koala.errors import UserError
from koala.lora.folder import lora_file, lora_names


def folder_of(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_files_are_found_by_the_names_that_people_give_them(tmp_path):
    files = (
        "my style [v2] \u2013 \u0451\u0436.safetensors", "UPPER.SAFETENSORS", "v1.2.safetensors",
        "sub/ink, thin (1).safetensors",
    )  # fmt: skip
    folder = folder_of(tmp_path, *files, "._v1.2.safetensors", ".cache/x.safetensors", "notes.txt")
    names = [Path(file).stem for file in files]
    assert lora_names(folder) == sorted(names)
    assert [lora_file(folder, name) for name in names] == [folder / file for file in files]
    assert lora_file(folder, " v1.2.safetensors ") == folder / "v1.2.safetensors"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folder = folder_of(tmp_path, "ink.safetensors", "a/ink.safetensors", "b/c/ink.safetensors")
    assert lora_names(folder) == ["a/ink", "b/c/ink", "ink"]
    assert lora_file(folder, "b/c/ink") == folder / "b/c/ink.safetensors"
    assert lora_file(folder, "ink") == folder / "ink.safetensors"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a<b", "a:b", ""])
def test_what_no_prompt_can_name_is_no_name(tmp_path, name):
    folder = folder_of(tmp_path / "in", "v1.safetensors", "a<b.safetensors", "a:b.safetensors")
    (tmp_path / "secret.safetensors").touch()
    with pytest.raises(UserError, match=r"unknown LoRA .*: choose v1"):
        lora_file(folder, name)


def test_no_folder_has_no_names(tmp_path):
    assert lora_names(None) == []
    with pytest.raises(UserError, match="is no folder: give one that holds LoRAs"):
        lora_file(tmp_path / "none", "ink")
