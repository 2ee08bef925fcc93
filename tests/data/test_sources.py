"""Every layout that pictures come in gives the same items, and what is none is refused."""

import pickle
import shutil

import pytest

from koala.data.sources import recognise
from koala.errors import UserError
from toy_sources import LAYOUTS, caption, images, write_folder, write_parquet, write_tars

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
    assert source.name == layout.split(" of ")[0].split(" zipped")[0].split(" unpacked")[0]
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
    cut = write_tars(tmp_path / "cut", files)
    (cut / "00001.tar").write_bytes((cut / "00001.tar").read_bytes()[:5000])
    for place, kind, said in (
        (tmp_path / "nowhere", None, "does not exist.*ye-pop"),
        (tmp_path / "empty", None, "none of folder"),
        (both, None, "may be webdataset or folder.*--as"),
        (both, "zip", "unknown kind of source .zip.: choose folder"),
        (both, "parquet", "has no image column.*url"),
        (cut, None, "00001.tar is not a complete tar"),
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
