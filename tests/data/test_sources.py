"""Every layout that pictures come in gives the same items, and what is none is refused."""

import io
import json
import pickle
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from koala.data.sources import recognise
from koala.errors import UserError
from toy_sources import (
    LAYOUTS,
    caption,
    images,
    write_folder,
    write_parquet,
    write_saved,
    write_tars,
)

NUMBER = 23


@pytest.fixture(scope="module")
def files():
    return images(NUMBER)


def all_items(source):
    return [
        item
        for part in source.parts()
        for item in source.items(part, 0, source.count(part))
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_images_in_order(layout, files, tmp_path):
    kind = None if layout != "parquet of paths" else "parquet"
    source = recognise(LAYOUTS[layout](tmp_path / "there", files), kind)
    assert source.name == layout.split()[0]
    items = all_items(source)
    assert [item.read() for item in items] == files
    field = "cogvlm_caption" if source.name == "ye-pop" else "text"
    assert [item.captions[field] for item in items] == [caption(n) for n in range(NUMBER)]
    assert len({item.id for item in items}) == NUMBER


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_of_items_are_what_the_whole_has_there(layout, files, tmp_path):
    kind = None if layout != "parquet of paths" else "parquet"
    source = recognise(LAYOUTS[layout](tmp_path / "there", files), kind)
    source = pickle.loads(pickle.dumps(source))  # as it comes to a worker
    for part in source.parts():
        whole = [i.id for i in source.items(part, 0, source.count(part))]
        runs = [i.id for first in range(0, len(whole), 4) for i in source.items(part, first, 4)]
        assert runs == whole


def test_scores_go_by_one_name(files, tmp_path):
    for layout, score in (
        ("folder of jsonl", "nsfw"),
        ("folder of csv", "nsfw"),
        ("folder of json", "nsfw"),
        ("webdataset", "nsfw"),
        ("parquet of bytes", "similarity"),
        ("ye-pop zipped", "nsfw"),
    ):
        source = recognise(LAYOUTS[layout](tmp_path / layout, files))
        assert [i.scores[score] for i in all_items(source)] == [n / 10 for n in range(NUMBER)]


def test_yepop_has_its_captions_field_by_field(files, tmp_path):
    source = recognise(LAYOUTS["ye-pop zipped"](tmp_path / "there", files))
    (first, *_) = all_items(source)
    assert first.captions == {
        "alt_txt": "alt 0", "cogvlm_caption": caption(0), "llava_caption": "llava 0"
    }  # fmt: skip
    assert first.scores == {"nsfw": 0.0, "similarity": 0.3}
    assert source.captions == ("alt_txt+cogvlm_caption",)


def test_a_single_file_is_a_source(files, tmp_path):
    tars, table = write_tars(tmp_path / "t", files), write_parquet(tmp_path / "p", files)
    assert len(all_items(recognise(tars / "00000.tar"))) == 10
    assert len(all_items(recognise(table / "a.parquet"))) == 12


def test_a_image_that_is_not_there_costs_itself(files, tmp_path):
    root = LAYOUTS["ye-pop unpacked"](tmp_path / "y", files)
    (root / "images/chunk_0/chunk_0/0000003.jpg").unlink()
    items = all_items(recognise(root))
    with pytest.raises(OSError, match="chunk_0"):
        items[3].read()
    assert items[4].read() == files[4]
    tars = write_tars(tmp_path / "t", files)
    data = (tars / "00000.tar").read_bytes().replace(b'"punsafe": 0.2', b'"punsafe": ...')
    (tars / "00000.tar").write_bytes(data)
    items = all_items(recognise(tars))
    with pytest.raises(OSError, match="json is not valid JSON"):
        items[2].read()
    assert items[3].read() == files[3]


def test_what_is_no_source_is_refused(files, tmp_path):
    both = write_folder(tmp_path / "both", files[:2])
    shutil.copytree(write_tars(tmp_path / "tars", files[:2]), both / "tars")
    (tmp_path / "empty").mkdir()
    for place, kind, said in (
        (tmp_path / "nowhere", None, "does not exist.*ye-pop"),
        (tmp_path / "empty", None, "none of folder"),
        (both, None, "may be webdataset or folder.*--as"),
        (both, "zip", "unknown kind of source .zip.: choose folder"),
        (both, "parquet", "has no image column.*url"),
    ):
        with pytest.raises(UserError, match=said):
            all_items(recognise(place, kind))
    assert len(all_items(recognise(both, "folder"))) == 2


def test_metadata_that_cannot_be_read_is_named(files, tmp_path):
    root = write_folder(tmp_path / "there", files[:3], "jsonl")
    lines = (root / "metadata.jsonl").read_text().splitlines()
    (root / "metadata.jsonl").write_text("\n".join([lines[0], "{broken", lines[2]]))
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        all_items(recognise(root))


# --- captions -------------------------------------------------------------------------------


def test_captions_may_be_lists_and_structures(files, tmp_path):
    columns = {
        "image": [{"bytes": data, "path": None} for data in files[:2]],
        "captions": [["a fox", "the fox"], ["an owl", "the owl"]],
        "prompts": [{"short": "fox", "long": "a long fox"}] * 2,
        "tags": [["red", "fox"], ["owl"]],
        "LANGUAGE": ["en", "en"],
        "nsfw": ["UNLIKELY", "0.5"],
        "boxes": [["none"], ["none"]],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = all_items(recognise(tmp_path))
    assert first.captions == {
        "captions.0": "a fox", "captions.1": "the fox", "prompts.short": "fox",
        "prompts.long": "a long fox", "tags": "red, fox",
    }  # fmt: skip
    assert (first.scores, second.scores) == ({}, {"nsfw": 0.5})


def test_texts_of_a_key_go_by_their_names_and_without_a_byte_order_mark(files, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("0.jpg", files[0]),
            ("0.cogvlm.txt", b"\xef\xbb\xbfa fox"),
            ("0.txt", b"fox"),
            ("0.caption", b"the fox"),
            ("0.json", b'\xef\xbb\xbf{"title": "Fox"}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (item,) = all_items(recognise(tmp_path))
    assert item.captions == {"title": "Fox", "cogvlm": "a fox", "text": "the fox"}
    assert item.read() == files[0]
    root = write_folder(tmp_path / "folder", files[:1])
    (root / "0000.txt").write_bytes(b"\xef\xbb\xbfa fox")
    assert all_items(recognise(root))[0].captions == {"text": "a fox"}


def test_kohyas_folders_repeat_their_images_and_name_those_without_a_caption(files, tmp_path):
    for name in ("10_a fox", "1_reg", "2024_05"):
        write_folder(tmp_path / name, files[:1], "none" if name == "10_a fox" else "txt")
    found = [(i.id, i.kind, i.captions["text"]) for i in all_items(recognise(tmp_path))]
    assert found == [
        ("10_a fox/0000.jpg", "repeated 10 times", "a fox"),
        ("1_reg/0000.jpg", "picture", caption(0)),
        ("2024_05/0000.jpg", "picture", caption(0)),
    ]
    write_folder(tmp_path / "10_a fox" / "0_none", files[:1])
    with pytest.raises(UserError, match="0 repeats show nothing"):
        all_items(recognise(tmp_path / "10_a fox"))


def test_metadata_of_other_images_are_refused(files, tmp_path):
    root = write_folder(tmp_path / "there", files[:2], "jsonl")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "x/1.jpg", "text": "a"}))
    with pytest.raises(UserError, match=r"name 1 images, such as x/1\.jpg, and none"):
        all_items(recognise(root))


# --- splits ---------------------------------------------------------------------------------


def splits(source):
    return [item.split for item in all_items(source)]


def test_what_a_source_calls_a_test_is_held_out(files, tmp_path):
    tables = write_parquet(tmp_path / "tables", files[:4])
    (tables / "a.parquet").rename(tables / "train-00000-of-00001.parquet")
    (tables / "b.parquet").rename(tables / "validation-00000-of-00001.parquet")
    assert splits(recognise(tables)) == [None, None, "test", "test"]
    alone = tables / "validation-00000-of-00001.parquet"
    assert splits(recognise(alone)) == [None, None]  # named on purpose
    tars = write_tars(tmp_path / "tars", files[:4], each=2)
    (tars / "00001.tar").rename(tars / "test-00000.tar")
    assert splits(recognise(tars, "webdataset")) == [None, None, "test", "test"]
    for name in ("train", "test", "testimony"):
        write_folder(tmp_path / "folder" / name, files[:1])
    assert splits(recognise(tmp_path / "folder")) == ["test", None, None]
    saved = write_saved(tmp_path / "saved", files[:4], {"train": 3, "test": 1})
    assert splits(recognise(saved)) == [None, None, None, "test"]


# --- damage ---------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_costs_what_is_lost(files, tmp_path):
    for suffix in ("tar", "tar.gz"):
        tars = write_tars(tmp_path / suffix, files, ending=suffix)
        cut = tars / f"00001.{suffix}"
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        items = all_items(recognise(tars))
        lost = [item for item in items if item.damage]
        assert [item.id for item in lost] == [f"00001.{suffix}"]
        assert "not a complete tar" in lost[0].damage and "download it again" in lost[0].damage
        whole = [item for item in items if not item.damage]
        assert 13 + 2 < len(whole) < NUMBER
        assert [item.read() for item in whole[-3:]] == files[-3:]
    tables, saved = write_parquet(tmp_path / "p", files), write_saved(tmp_path / "s", files)
    for source, cut, rest in (
        (tables, tables / "a.parquet", NUMBER // 2),
        (saved, saved / "data-00000-of-00001.arrow", 0),
    ):
        cut.write_bytes(cut.read_bytes()[:5000])
        items = all_items(recognise(source))
        assert [bool(item.damage) for item in items] == [True] + [False] * rest
