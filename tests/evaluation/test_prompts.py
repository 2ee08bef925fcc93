"""Prompts from files, and from the published sets in their own layouts at toy size."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from koala.data.latent_preparation import prepare_latents
from koala.data.preprocess import Preparation
from koala.data.sources import recognise
from koala.errors import UserError
from koala.evaluation.pictures import matched, real_folder
from koala.evaluation.prompt_sets import SETS, read_prompts
from koala.evaluation.prompts import Prompt, PromptSet, read_file, write
from koala.generation.prompt_editing import by_step
from koala.generation.prompt_loras import split_loras
from koala.generation.prompt_syntax import parse
from toy_sources import images, write_folder


def texts(prompts: PromptSet) -> list[str]:
    return [prompt.text for prompt in prompts.prompts]


def test_text_csv_and_json_files_hold_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\n\n  an owl \n")
    (tmp_path / "b.csv").write_text('Prompt,Category,Note\n"a fox, red",animals,x\nowl,animals,y\n')
    (tmp_path / "c.jsonl").write_text(
        '{"id": "f", "caption": "a fox", "questions": [["A fox?", "yes"]]}\n"an owl"\n'
    )
    (tmp_path / "d.json").write_text('["a fox", {"text": "an owl", "id": 7}]')
    assert texts(read_prompts(str(tmp_path / "a.txt"))) == ["a fox", "an owl"]
    table = read_file(tmp_path / "b.csv")
    assert table.prompts[0] == Prompt("00000", "a fox, red", "animals", {"note": "x"})
    assert table.categories == [] and table.name == "b"
    lines = read_file(tmp_path / "c.jsonl")
    assert lines.prompts[0] == Prompt("f", "a fox", "", {"questions": [["A fox?", "yes"]]})
    assert [p.id for p in lines.prompts] == ["f", "00001"]
    assert [p.id for p in read_file(tmp_path / "d.json").prompts] == ["00000", "7"]
    (tmp_path / "again.jsonl").write_text(write(lines.prompts))
    assert read_file(tmp_path / "again.jsonl").prompts == lines.prompts


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", " \n\n", "has no prompts"),
        ("a.csv", "name\nfox\n", "line 2 has no prompt.*it has name"),
        ("a.csv", "prompt\n''\nfox\n".replace("''", '" "'), "'00000' is empty"),
        ("a.jsonl", "{fox}\n", "line 1 is not valid JSON"),
        ("a.jsonl", "[1]\n", "holds \\[1\\]"),
        ("a.json", '{"a": 1}', "record 1 has no prompt"),
        ("a.jsonl", '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "two prompts have"),
        ("a.md", "fox", "allowed are files that end in"),
        ("gone.txt", None, "gone.txt does not exist"),
    ],
)
def test_a_file_without_prompts_is_told(name, text, says, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(str(tmp_path / name))


def test_a_set_that_is_not_known_is_answered_with_the_closest():
    with pytest.raises(UserError, match=r"unknown prompts 'genevall': .*did you mean geneval\?"):
        read_prompts("genevall")


def test_files_of_other_programs_hold_the_same_prompts(tmp_path):
    both = ["a red fox, running", "an owl"]
    for name, text in (
        ("notes.txt", "# of mine\r\n\r\na red fox, running\r\n#\r\nan owl\r\n"),
        ("drawbench.csv", 'Prompts,Category\n"a red fox, running",x\n\nan owl,y\n'),
        ("excel.csv", "\ufeffprompt;id\r\na red fox, running;0\r\nan owl;1\r\n"),
        ("parti.tsv", "Prompt\tCategory\na red fox, running\tx\nan owl\ty\n"),
        ("bench.json", '{"prompts": ["a red fox, running", {"prompt": "an owl"}]}'),
        ("named.json", '{"0": {"prompt": "a red fox, running"}, "1": {"prompt": "an owl"}}'),
        ("lines.json", '{"text": "a red fox, running"}\n{"text": "an owl"}\n'),
    ):
        for codec in ("utf-8", "utf-16"):
            (tmp_path / name).write_bytes(text.removeprefix("\ufeff").encode(codec))
            assert texts(read_prompts(str(tmp_path / name))) == both, (name, codec)
    assert [p.id for p in read_file(tmp_path / "excel.csv").prompts] == ["0", "1"]
    pq.write_table(pa.table({"Prompt": both, "Note": ["x", None]}), tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet")
    assert texts(table) == both and [p.facts for p in table.prompts] == [{"note": "x"}, {}]


def test_a_prompt_is_never_cut_or_split(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\u2028running\n#1 fan\n")
    assert texts(read_file(tmp_path / "a.txt")) == ["a fox\u2028running", "#1 fan"]
    (tmp_path / "a.csv").write_text("prompt,category\na fox, running,x\n")
    with pytest.raises(UserError, match="line 2 has 3 fields"):
        read_file(tmp_path / "a.csv")
    (tmp_path / "geneval2_data.jsonl").write_text('{"prompt": "a fox"}\n')
    with pytest.raises(UserError, match=r"is not in the layout of geneval2 .*atom_count"):
        read_prompts(str(tmp_path / "geneval2_data.jsonl"))


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="line 1 is not UTF-16 text"):
        read_prompts(str(tmp_path / "a.txt"))


def test_a_prompt_is_drawn_word_for_word():
    text = "a (small:1.2) [cat|dog] BREAK, AND \\ C:(drive"
    parts = parse(Prompt("0", text).literal)
    assert [(f.text, f.weight) for part in parts for f in part] == [
        ("a (small:1.2) [cat|dog] break, and \\ C:(drive", 1.0)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a cat, 8k --ar 16:9", "an owl \u2014no text", "a cat:: a dog::2", "1.3::cat::", "(cat)1.3",
        "{red|blue} cat", "${a} cat", "__hair__ girl", "embedding:style cat", "/imagine a fox",
        "<lora:ink:1> fox", "<random:a,b>", "a fox.and(b)", "(cat:1,3)", "^_^ \\o/ <|x|>",
    ],
)  # fmt: skip
def test_other_programs_syntax_is_words_in_a_set(text):
    """A published set is drawn to its end, whatever its prompts were once written for."""
    literal = Prompt("0", text).literal
    assert split_loras(literal, None) == (literal, {})
    assert by_step(literal, 4) == [literal] * 4
    assert [[(f.text, f.weight) for f in part] for part in parse(literal)] == [[(text, 1.0)]]


def test_fewer_prompts_are_chosen_by_their_ids_in_their_order():
    every = PromptSet("x", tuple(Prompt(f"{i:05d}", str(i)) for i in range(50)))
    few = every.first(10).prompts
    assert few == every.first(20).first(10).prompts
    assert [*few] == sorted(few, key=lambda p: p.id) and few != every.prompts[:10]
    with pytest.raises(UserError, match="51 prompts requested, but x has 50"):
        every.first(51)


def hpsv2(folder: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{style}.json").write_text(json.dumps([f"a fox, {style}", "an owl"]))


def compbench(folder: Path) -> None:
    data = folder / "examples" / "dataset"
    data.mkdir(parents=True)
    for name in ("color", "shape", "texture", "spatial", "non_spatial"):
        (data / f"{name}_val.txt").write_text(f"a {name} cat and a dog\na fox on side of a key\n")
    (data / "complex_val.txt").write_text("A cat on a mat.\nA dog runs. \nThe red fox.\n")
    (data / "complex_val_spatial.txt").write_text("A cat on a mat.\n")
    (data / "complex_val_action.txt").write_text("a dog runs\n")


def geneval(folder: Path) -> None:
    (folder / "prompts").mkdir()
    rows = [
        {"tag": "counting", "include": [{"class": "fox", "count": 2}], "prompt": "two foxes"},
        {"tag": "colors", "include": [], "prompt": "a red fox"},
    ]
    text = "\n".join(map(json.dumps, rows))
    (folder / "prompts" / "evaluation_metadata.jsonl").write_text(text)


def geneval2(folder: Path) -> None:
    row = {
        "prompt": "two foxes", "atom_count": 2,
        "vqa_list": [["How many foxes are in the image?", "two"]], "skills": ["count"],
    }  # fmt: skip
    (folder / "geneval2_data.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({**row, "prompt": "a fox"})
    )


def dpg(folder: Path) -> None:
    names = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
             "category_detailed", "tuple", "question_natural_language"]  # fmt: skip
    rows = [
        ["whoops7", "A fox,\nin the rain.", "", 1, 0, "entity", "whole", "", "Is there a fox?"],
        ["whoops7", "", "", 2, "1, 3", "attribute", "", "", "Is it red?"],
        ["whoops7", "", "", 3, 1, "global", "", "", "Is it raining?"],
        ["8", "An owl.", "", 1, 0, "entity", "whole", "", "Is there an owl?"],
    ]
    (folder / "dpg_bench").mkdir()
    with (folder / "dpg_bench" / "dpg_bench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def parti(folder: Path) -> None:
    (folder / "PartiPrompts.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\na "fox\tAnimals\tBasic\t\n'
    )


def mjhq(folder: Path) -> None:
    rows = {name: {"category": "animals", "prompt": f"a {name}"} for name in ("fox", "owl")}
    (folder / "meta_data.json").write_text(json.dumps(rows))


def coco(folder: Path) -> None:
    (folder / "annotations").mkdir()
    told = {
        "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (9, 4)],
        "annotations": [
            {"id": 3, "image_id": 9, "caption": "second"},
            {"id": 2, "image_id": 9, "caption": "A fox\n runs. "},
            {"id": 1, "image_id": 4, "caption": "An owl."},
        ],
    }
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(told))


LAYOUTS = {
    "hpsv2": (hpsv2, 8, "anime/00000"),
    "t2i-compbench": (compbench, 13, "color/00000"),
    "geneval": (geneval, 2, "00000"),
    "geneval2": (geneval2, 2, "00000"),
    "dpg-bench": (dpg, 2, "whoops7"),
    "partiprompts": (parti, 2, "00000"),
    "mjhq-30k": (mjhq, 2, "fox"),
    "coco": (coco, 2, "COCO_val2014_000000000009"),
}


@pytest.mark.parametrize("name", SETS)
def test_published_layouts_are_recognised_and_named(name, tmp_path, monkeypatch):
    write_layout, count, first = LAYOUTS[name]
    write_layout(tmp_path)
    found = read_prompts(str(tmp_path))
    assert (found.name, len(found.prompts), found.prompts[0].id) == (name, count, first)
    assert read_prompts(f"{name}={tmp_path}") == found
    with pytest.raises(UserError, match=f"{name} is not at .*get it from https://"):
        read_prompts(f"{name}={tmp_path / 'gone'}")
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "sets").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is not at"):
        read_prompts(name)
    (tmp_path / "cache" / "sets" / name).symlink_to(tmp_path)
    assert read_prompts(name) == found


def test_what_the_sets_ask_is_read(tmp_path):
    for name, (write_layout, _, _) in LAYOUTS.items():
        (tmp_path / name).mkdir()
        write_layout(tmp_path / name)
    read = {name: read_prompts(str(tmp_path / name)).prompts for name in LAYOUTS}
    relations = [p.facts["relation"] for p in read["t2i-compbench"] if p.category == "complex"]
    assert relations == ["spatial", "action", "both"]
    assert read["geneval"][0].facts["include"] == [{"class": "fox", "count": 2}]
    assert read["geneval"][1].category == "colors"
    assert read["geneval2"][0].facts["questions"][0][1] == "two"
    fox = read["dpg-bench"][0]
    assert fox.text == "A fox,\nin the rain."
    assert [(q["number"], q["after"]) for q in fox.facts["propositions"]] == [
        (1, []), (2, [1, 3]), (3, [1]),
    ]  # fmt: skip
    assert texts(read_prompts(str(tmp_path / "coco"))) == ["A fox runs.", "An owl."]


def test_one_file_of_a_set_of_several_is_a_list_like_others(tmp_path):
    compbench(tmp_path)
    alone = read_prompts(str(tmp_path / "examples" / "dataset" / "color_val.txt"))
    assert (alone.name, len(alone.prompts), alone.metrics) == ("color_val", 2, ())


def test_held_out_captions_of_prepared_data_are_prompts(toy_sdxl, tmp_path):
    source = write_folder(tmp_path / "images", images(24, [(70, 70)]))
    preparation = Preparation(size=64, held_out=0.25)
    prepare_latents(
        recognise(source), out=tmp_path / "data", model=toy_sdxl, preparation=preparation,
        workers=1,
    )  # fmt: skip
    found = read_prompts(str(tmp_path / "data"))
    assert 0 < len(found.prompts) < 24 and all(texts(found))
    (tmp_path / "data" / "shards.arrow").unlink()
    with pytest.raises(UserError, match="not completely prepared"):
        read_prompts(str(tmp_path / "data"))


def pictures(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


FOX = PromptSet("x", (Prompt("anime/00000", "a fox/cat."), Prompt("00001", "an owl")))


@pytest.mark.parametrize(
    "names",
    [
        ["anime/00000.png", "00001.png"],
        ["anime/00000_0.jpg", "anime/00000-1.jpg", "00001_0.png", "00001_1.png"],
        ["a fox cat_000000.png", "an owl_000007.png"],
        ["anime/00000.webp", "1.png"],
        ["anime/00000_0.webp", "anime/00000_1.webp", "0001_0.png", "001_1.png"],
        ["anime/00000.png", "1/samples/0000.png"],
        ["anime/00000.png", "00001/samples/0000.png"],
    ],
)
def test_pictures_find_their_prompts(names, tmp_path):
    found = matched(pictures(tmp_path, names), FOX)
    each = len(names) // 2
    assert [[file.relative_to(tmp_path).as_posix() for file in files] for files in found] == [
        names[:each], names[each:],
    ]  # fmt: skip


def test_pictures_without_prompts_are_told(tmp_path):
    with pytest.raises(UserError, match="neither a model"):
        matched(tmp_path, FOX)
    pictures(tmp_path, ["anime/00000.png", "other.png"])
    with pytest.raises(
        UserError, match=r"no picture of the prompt '00001'.*; there is anime/00000\.png"
    ):
        matched(tmp_path, FOX)
    pictures(tmp_path, ["00001.png", "00001_1.png"])
    with pytest.raises(UserError, match="1 pictures of the prompt 'anime/00000' and 2 of others"):
        matched(tmp_path, FOX)


def test_real_pictures_belong_to_prompts_by_their_ids(tmp_path):
    pictures(tmp_path, ["people/00001.jpg", "people/a.jpg", "anime/00000.jpg"])
    real = real_folder(tmp_path, FOX.prompts)
    assert len(real.reference) == 3 and real.own == (0, 1)
    assert real_folder(tmp_path, [Prompt("z", "z")]).own == ()
