"""Every layout that pictures come in gives the same items, and what is none is refused."""

import base64
import io
import json
import pickle
import shutil
import tarfile
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from koala.data.preprocess import Preparation, unused_captions, with_captions
from koala.data.sources import recognise
from koala.errors import UserError
from toy_sources import (
    LAYOUTS,
    caption,
    image,
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
    assert "json is not valid JSON" in items[2].damage
    assert items[3].read() == files[3]


def test_what_is_no_source_is_refused(files, tmp_path):
    both = write_folder(tmp_path / "both", files[:2])
    shutil.copytree(write_tars(tmp_path / "tars", files[:2]), both / "tars")
    (tmp_path / "empty").mkdir()
    for place, kind, said in (
        (tmp_path / "nowhere", None, "does not exist.*ye-pop"),
        (tmp_path / "empty", None, "is empty"),
        (both, None, "may be webdataset or folder.*--as"),
        (both, "zip", "unknown kind of source .zip.: choose folder"),
        (both, "parquet", "URLs of its images"),
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
    assert all_items(recognise(root))[0].captions["text"] == "a fox"


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
    with pytest.raises(UserError, match=r"name 1 images, such as x/1\.jpg .*line 1\), and none"):
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


# --- as people have them --------------------------------------------------------------------


def put(root, *names):
    """Images of these names, each another."""
    for n, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(n))
    return root


def captions_in(place, field="text"):
    """Caption by image, of the items that have one."""
    source = recognise(place)
    return {item.id: item.captions.get(field, item.damage or item.no_image)
            for item in all_items(source)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "File Name;text\r\na.jpg;a fox\r\nsub\\B.jpg;an owl\r\n"),
        ("metadata.tsv", "image\ttext\na.jpg\ta fox\nsub/b\tan owl\n"),
        ("metadata.json", '{"a.jpg": "a fox", "./sub/b.JPG": {"text": "an owl"}}'),
        ("captions.json", '[{"image": "a.jpg", "text": "a fox"}, {"img": "b.jpg", "text": "no"}]'),
        ("meta_cap.json", '{"a": {"text": "a fox"}, "sub/b": {"text": "an owl"}}'),
        ("captions.csv", "path,text\n/elsewhere/a.jpg,a fox\n/elsewhere/sub/b.jpg,an owl\n"),
    ],
)
def test_tables_of_other_programs_name_their_images_in_their_way(name, text, tmp_path):
    put(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / name).write_text(text, newline="")
    found = captions_in(tmp_path)
    if name == "captions.json":  # in its own folder there is no such image
        assert found.pop("b.jpg") == "named in captions.json, record 2, but not there"
    assert found["a.jpg"] == "a fox"
    assert found["sub/b.jpg"] == ("" if name == "captions.json" else "an owl")


def test_published_layouts_of_captions_are_read(tmp_path):
    coco = put(tmp_path / "coco", "val2017/01.jpg", "val2017/02.jpg")
    (coco / "annotations").mkdir()
    told = [{"image_id": i, "caption": f"{i} {k}"} for i in (1, 2) for k in "ab"]
    (coco / "annotations/captions_val2017.json").write_text(
        json.dumps({"images": [{"id": i, "file_name": f"0{i}.jpg"} for i in (1, 2)],
                    "annotations": told})
    )  # fmt: skip
    (coco / "annotations/instances_val2017.json").write_text('{"images": [], "annotations": []}')
    assert captions_in(coco, "caption.1") == {"val2017/01.jpg": "1 b", "val2017/02.jpg": "2 b"}
    flickr = put(tmp_path / "flickr", "Images/a.jpg")
    (flickr / "captions.txt").write_text("image,caption\na.jpg,a fox\na.jpg,the fox\n")
    assert captions_in(flickr, "caption.1") == {"Images/a.jpg": "the fox"}
    diffusion = put(tmp_path / "db", "u.png")
    (diffusion / "part-000001.json").write_text('{"u.png": {"p": "a fox", "sa": "k_lms"}}')
    assert all_items(recognise(diffusion))[0].captions == {"prompt": "a fox", "file_name": "u"}
    booru = put(tmp_path / "booru", "a.jpg")
    tags = {"tag_string": "1girl long_hair ^_^", "tags": [{"name": "red_eyes"}], "rating": "s"}
    (booru / "a.jpg.json").write_text(json.dumps(tags))
    (item,) = all_items(recognise(booru))
    assert item.captions["tag_string"] == "1girl, long hair, ^_^"
    assert item.captions["tags"] == "red eyes" and "rating" not in item.captions


def test_any_table_is_a_source_of_the_images_that_it_names(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "mine.csv").write_text("image,text\na.jpg,a fox\nc.jpg,an owl\n")
    assert captions_in(tmp_path / "mine.csv") == {"a.jpg": "a fox", "c.jpg": "an owl"}
    with pytest.raises(UserError, match=r"mine\.csv is no such table: to read it, give it"):
        with_captions(recognise(tmp_path), Preparation())
    named = with_captions(recognise(tmp_path), Preparation(captions=("file_name",)))
    assert named.captions == ("file_name",)


def test_a_configuration_of_kohyas_scripts_is_a_source(tmp_path, capsys):
    put(tmp_path / "pictures", "a.jpg", "b.jpg")
    (tmp_path / "pictures/a.cap").write_text("a fox")
    (tmp_path / "sets.toml").write_text(
        '[general]\ncaption_extension = ".cap"\nflip_aug = true\n[[datasets]]\n'
        '[[datasets.subsets]]\nimage_dir = "pictures"\nnum_repeats = 5\nclass_tokens = "fox"\n'
    )
    assert captions_in(tmp_path / "sets.toml") == {
        "1 pictures/a.jpg": "a fox", "1 pictures/b.jpg": "fox"
    }  # fmt: skip
    assert "not used here: flip_aug" in capsys.readouterr().err
    (item, _) = all_items(recognise(tmp_path / "sets.toml"))
    assert item.kind == "repeated 5 times"
    (tmp_path / "sets.toml").write_text("[model]\n")
    with pytest.raises(UserError, match=r"lists no \[\[datasets\]\]"):
        all_items(recognise(tmp_path / "sets.toml"))


def test_names_of_files_are_found_in_every_spelling(tmp_path):
    nfd, nfc = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    put(tmp_path, f"{nfd}.JPG", "B.jpeg", "c.jpg", "v1.5 d.webp")
    for name in (f"{nfc}.txt", "b.TXT", "c.jpg.txt", "v1.5 d.txt"):
        (tmp_path / name).write_text(name)
    assert [*captions_in(tmp_path).values()] == ["b.TXT", "c.jpg.txt", f"{nfc}.txt", "v1.5 d.txt"]


def test_captions_may_stand_in_the_names_of_files(tmp_path):
    put(tmp_path, "a photo of john_001.jpg", "a_red_fox (2).jpg", "007.jpg")
    found = captions_in(tmp_path, "file_name")
    assert [*found.values()] == ["007", "a photo of john", "a red fox"]


def test_hidden_files_are_left_out_and_links_followed(tmp_path):
    root = put(tmp_path / "there", "a.jpg", "._a.jpg", "__MACOSX/b.jpg", ".cache/c.jpg")
    put(tmp_path / "other", "d.jpg")
    (root / "sub").symlink_to(tmp_path / "other")
    (root / "back").symlink_to(root)
    (root / "broken.jpg").symlink_to("gone.jpg")
    (root / "e.svg").write_text("<svg/>")
    items = {item.id: item for item in all_items(recognise(root))}
    assert [*items] == ["a.jpg", "broken.jpg", "sub/d.jpg", "e.svg"]
    with pytest.raises(FileNotFoundError):
        items["broken.jpg"].read()
    assert "not read here" in items["e.svg"].no_image


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_captions_that_are_no_text_cost_their_image(ending, tmp_path):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    good = '"a fox"' if ending == "json" else "a fox"
    (tmp_path / f"a.{ending}").write_bytes(b'"caf\xe9"')
    (tmp_path / f"b.{ending}").write_bytes(good.encode("utf-16"))
    (tmp_path / f"c.{ending}").write_bytes(b"\0\0")
    found = captions_in(tmp_path)
    assert found["b.jpg"] == "a fox"
    assert f"a.{ending} (line 1 is not UTF-8" in found["a.jpg"]
    assert "NUL" in found["c.jpg"]


def test_tars_are_read_by_what_is_in_them(tmp_path):
    def write(name, mode, *files):
        with tarfile.open(tmp_path / name, mode) as tar:
            for file, data in files:
                member = tarfile.TarInfo(file)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    write("0.tar", "w:gz", ("./x/0.IMAGE.png", image(0)), ("./x/0.TXT", b"a fox"), ("._0.jpg", b""))
    write("1.tar", "w", ("1.txt", b"alone"), ("2.jpg", image(2)), ("2.txt", b"caf\xe9"))
    first, alone, wrong = all_items(recognise(tmp_path))
    assert first.read() == image(0) and first.captions == {"text": "a fox"}
    assert "no image of its own among 1.txt" in alone.no_image
    assert "2.txt (line 1 is not UTF-8" in wrong.damage


def test_images_in_a_table_are_found_by_type_and_urls_are_told(tmp_path):
    def first(name, **columns):
        pq.write_table(pa.table(columns), tmp_path / name)
        return all_items(recognise(tmp_path / name))[0]

    assert first("a.PARQUET", Image=[image(0)], TEXT=["x"]).read() == image(0)
    assert first("b.parquet", data=[image(1)], text=["x"]).read() == image(1)
    coded = base64.b64encode(image(2)).decode()
    assert first("c.parquet", image=[coded], text=["x"]).read() == image(2)
    assert "is a URL" in first("d.parquet", image=["https://x/a.jpg"], text=["x"]).no_image
    assert "no image" in first("e.parquet", image=pa.array([None], pa.binary())).no_image
    with pytest.raises(UserError, match=r"URLs of its images.*img2dataset"):
        first("f.parquet", URL=["https://x/a.jpg"], TEXT=["x"])
    with pytest.raises(UserError, match=r"none of the source's first 1 images.*is a URL"):
        with_captions(recognise(tmp_path / "d.parquet"), Preparation())


def test_damage_inside_a_file_costs_what_it_hit(files, tmp_path):
    table = write_parquet(tmp_path / "p", files[:12]) / "a.parquet"  # row groups of three
    data = bytearray(table.read_bytes())
    data[300:2000] = bytes(1700)
    table.write_bytes(data)
    items = all_items(recognise(table))
    assert ["row group 0 is damaged" in item.damage for item in items] == [True] * 3 + [False] * 3
    assert [item.read() for item in items[3:]] == files[3:6]
    tars = write_tars(tmp_path / "t", files[:12], each=12, ending="tar.gz")
    data = bytearray((tars / "00000.tar.gz").read_bytes())
    data[9000:9400] = bytes(400)
    (tars / "00000.tar.gz").write_bytes(data)
    *items, last = all_items(recognise(tars))
    assert "not a complete tar" in last.damage
    assert 0 < len(items) < 12 and [item.read() for item in items] == files[: len(items)]


def test_files_of_img2dataset_are_a_folder(tmp_path):
    put(tmp_path, "00000/000000000.jpg")
    (tmp_path / "00000/000000000.txt").write_text("a fox")
    pq.write_table(pa.table({"url": ["http://x"]}), tmp_path / "00000.parquet")
    assert captions_in(tmp_path) == {"00000/000000000.jpg": "a fox"}


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("https://huggingface.co/datasets/org/name", "give its name, org/name"),
        ("s3://bucket/pictures", "is a URL, and nothing is downloaded"),
        ("a.jpg", "is one image: give the folder"),
        ("a.zip", "is an archive: unpack it"),
        ("zips", "holds b.zip, an archive: unpack it"),
        ("texts", "holds none of folder.*but 1 .md"),
        ("urls", "holds urls.csv, but no images.*img2dataset"),
        ("urls/urls.csv", "URLs of its images.*img2dataset"),
    ],
)
def test_what_is_no_source_is_told_what_to_do(place, says, tmp_path):
    put(tmp_path, "a.jpg", "a.zip", "zips/b.zip", "texts/a.md", "urls/.hidden.jpg")
    (tmp_path / "urls/urls.csv").write_text("url,caption\nhttp://x/a.jpg,a fox\n")
    with pytest.raises(UserError, match=says):
        all_items(recognise(place if "://" in place else tmp_path / place))


def test_fields_called_captions_are_the_captions_and_none_in_common_is_told(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg")
    rows = [{"file_name": f"{n}.jpg", "caption": "x", "artist": "y"} for n in "ab"]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    source = recognise(tmp_path)
    found = with_captions(source, Preparation())
    assert found.captions == ("caption",) and unused_captions(source, found) == ["artist"]
    other = put(tmp_path / "other", "a.jpg", "b.jpg")
    (other / "a.json").write_text('{"text": "a fox"}')
    (other / "b.json").write_text('{"caption": "an owl"}')
    with pytest.raises(UserError, match=r"no field in common, but text \(1\), caption \(1\)"):
        with_captions(recognise(other), Preparation())


def test_the_answer_of_a_conversation_is_a_caption(tmp_path):
    turns = (
        ("human", "<image>\nDescribe it."),
        ("gpt", "a fox"),
        ("human", "More?"),
        ("gpt", "snow"),
    )
    llava = [{"from": who, "value": said} for who, said in turns]
    said = [{"type": "image"}, {"type": "text", "text": "an owl"}]
    chat = [{"role": "user", "content": "Describe it."}, {"role": "assistant", "content": said}]
    put(tmp_path, "a.jpg", "b.jpg")
    rows = [{"image": f"{n}.jpg", "conversations": c} for n, c in (("a", llava), ("b", chat))]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    source = recognise(tmp_path)
    assert [i.captions["conversations"] for i in all_items(source)] == ["a fox", "an owl"]
    assert with_captions(source, Preparation()).captions == ("conversations",)


def test_labels_of_a_detector_are_no_captions(tmp_path):
    folder = put(tmp_path, "a.jpg", "b.jpg")
    (folder / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n3 .1 .1 1 1\n")
    (folder / "b.txt").write_text("1 0.25 0.5 0.2 0.1\n")
    with pytest.raises(UserError, match=r"are numbers alone, such as '0 0\.5 0\.5 0\.2 0\.2 3 \.1"):
        with_captions(recognise(folder), Preparation())
    (folder / "b.txt").write_text("route 66")
    assert with_captions(recognise(folder), Preparation()).captions == ("text",)


def test_a_folder_that_changed_is_another(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_text("a fox")
    before = recognise(tmp_path).parts()
    recognise(tmp_path)
    (tmp_path / "a.txt").write_text("an owl")
    assert recognise(tmp_path).parts() != before
