"""Tables are read whole and in one way, and what cannot be read is named with its line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from koala.errors import UserError
from koala.utils.records import decoded, records

ROWS = [{"file_name": "a.jpg", "text": 'a "red" fox, running'}, {"file_name": "b", "text": "é"}]


def read(path):
    return [record for _, record in records(path, "file_name")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_is_read_whoever_wrote_it(separator, end, codec, tmp_path):
    lines = ["file_name,text", 'a.jpg,"a ""red"" fox# running"', "", "b,é", ",", ""]
    text = end.join(lines).replace(",", separator).replace("#", ",")
    (tmp_path / "a.csv").write_bytes(text.encode(codec))
    assert read(tmp_path / "a.csv") == ROWS


def test_excels_line_that_names_the_separator_is_none_of_the_table(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\nfile_name;text\na.jpg;a fox, red\n")
    found = [("line 3", {"file_name": "a.jpg", "text": "a fox, red"})]
    assert [*records(tmp_path / "a.csv", "file_name")] == found


def test_a_quote_in_a_tsv_may_be_a_letter(tmp_path):
    text = 'text\tcategory\n"G I G" painted\tx\n5" high, "wide\ty\n'
    (tmp_path / "a.tsv").write_text(text)
    assert [row["text"] for row in read(tmp_path / "a.tsv")] == [
        '"G I G" painted',
        '5" high, "wide',
    ]


def test_json_in_every_shape_gives_the_same_records(tmp_path):
    named = {row["file_name"]: {"text": row["text"]} for row in ROWS}
    texts = {row["file_name"]: row["text"] for row in ROWS}
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for name, text in (
        ("list.json", json.dumps(ROWS, indent=1)),
        ("rows.json", json.dumps({"version": 1, "data": ROWS})),
        ("named.json", json.dumps(named)),
        ("texts.json", json.dumps(texts)),
        ("lines.json", lines),
        ("lines.jsonl", "\ufeff" + lines + "\n"),
        ("list.jsonl", json.dumps(ROWS, indent=1)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read(tmp_path / name) == ROWS, name
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS


def test_only_line_feeds_end_a_line_and_texts_may_be_long(tmp_path):
    text = "a\u2028fox\x0b" + "x" * 200_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    (tmp_path / "a.csv").write_text(f"text\n{text}\n")
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.csv") == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b"text\nfox\ncaf\xe9\n", r"line 3 is not UTF-8 text \(byte 0xe9\)"),
        ("a.csv", b"text\na \0fox\n", "line 2 holds a NUL"),
        ("a.csv", b"text\n\xff\xfea", "line 2 is not UTF-8"),
        ("a.csv", b"name,text\na,b\nc,a fox, red\n", "line 3 has 3 fields.*names 2.*in quotes"),
        ("a.csv", b'name,text\na,b\nc,"open\nd,e\n', "row of line 3 cannot be read"),
        ("a.csv", b"text,text\na,b\n", "two columns are called 'text'"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3 is not valid JSON"),
        ("a.json", b'[{"a": 1},', "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.parquet", b"PAR1", "not a complete parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.*{says}"):
        read(tmp_path / name)


def test_text_is_told_by_its_bytes():
    assert decoded("\ufeffé".encode()) == decoded("é".encode("utf-16")) == decoded(b"\xc3\xa9")
    with pytest.raises(ValueError, match="holds a NUL"):
        decoded("fox".encode("utf-16-le"))
