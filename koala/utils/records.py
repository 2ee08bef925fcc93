"""Tables as people have them: CSV, TSV, JSON, JSON lines and parquet, read in one way.

Text is UTF-8, or UTF-16 with its byte order mark. What cannot be read is a `UserError` that names
the file and the line; nothing is guessed, replaced or cut off.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from koala.errors import UserError
from koala.utils.extras import require

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_SEPARATORS = ",;\t|"
_EXCEL = re.compile(r"\s*sep=(.)\s*", re.IGNORECASE)  # a first line that names the separator
_LISTS = ("data", "rows", "records", "prompts", "samples", "items")  # keys of a JSON's only list
_GREATEST = 1 << 30  # characters of a field

Found = Iterator[tuple[str, Any]]


def decoded(data: bytes) -> str:
    """A text file's text. ValueError, which names the line, if it is neither UTF-8 nor UTF-16."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name, codec = ("UTF-16", "utf-16") if wide else ("UTF-8", "utf-8-sig")
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} is not {name} text (byte 0x{data[error.start]:02x}): save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} holds a NUL, which no text does: save it as UTF-8")
    return text


def text_of(path: Path) -> str:
    """The text of a file; UserError if it cannot be read."""
    try:
        return decoded(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers. Only line feeds and returns end a line."""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.rstrip("\n")


def records(path: Path, key: str) -> Found:
    """What a table holds, in order: ("line 3", record). A record of a CSV is a dict.

    key: the field that a JSON object of records by name puts each name in. A text or a list of
    texts in a record's place is its field `text`. UserError for a table that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path, text_of(path), key)
    elif suffix == ".json":
        yield from _json(path, text_of(path), key)
    else:
        yield from _csv(path, text_of(path))


def load_json(text: str, where: str) -> Any:
    """What the JSON says. UserError if it is none; `where` names it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error})") from None


# --- formats --------------------------------------------------------------------------------


def _csv(path: Path, text: str) -> Found:
    first = next((line for _, line in lines_of(text)), "")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    separator = max((usual, *_SEPARATORS), key=first.count)
    if said := _EXCEL.fullmatch(first):  # a blank line in its place keeps the numbers of lines
        separator, text = said[1], text.replace(first, "", 1)
    # In a TSV a quote may be a letter, as in PartiPrompts.
    quoted = separator != "\t" or _quotes_are_whole(text)
    names: list[str] = []
    for line, row in _rows(path, text, separator, quoted):
        where = f"line {line}"
        if not any(row):  # blank, or separators alone
            continue
        if names:
            yield where, _row(path, where, names, row)
            continue
        names = [name.strip() for name in row]
        for name in names:
            if name and names.count(name) > 1:
                raise UserError(f"{path}: two columns are called {name!r}: rename one")


def _rows(path: Path, text: str, separator: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV, with the lines that they begin at."""
    rows = _reader(text, separator, quoted)
    start = 1
    try:
        for row in rows:
            yield start, row
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: the row of line {start} cannot be read ({error}): put a text with quotes in "
            'quotes, and write each of its own as ""'
        ) from None


def _reader(text: str, separator: str, quoted: bool) -> Any:
    csv.field_size_limit(_GREATEST)
    return csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )  # fmt: skip


def _quotes_are_whole(text: str) -> bool:
    """Whether the quotes of a TSV enclose its fields."""
    try:
        return all(True for _ in _reader(text, "\t", quoted=True))
    except csv.Error:
        return False


def _row(path: Path, where: str, names: list[str], row: list[str]) -> dict[str, str]:
    if any(row[len(names) :]):
        raise UserError(
            f"{path}: {where} has {len(row)} fields, but the first line names {len(names)}: put a "
            "text that holds the separator in quotes"
        )
    return {name: value for name, value in zip(names, row, strict=False) if name}


def _json_lines(path: Path, text: str, key: str) -> Found:
    for number, line in lines_of(text):
        where = f"line {number}"
        if number == 1 and line.strip() in ("[", "{"):  # one JSON, on several lines
            yield from _json(path, text, key)
            return
        yield where, load_json(line, f"{path}: {where}")


def _json(path: Path, text: str, key: str) -> Found:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        first = next((line for _, line in lines_of(text)), "").strip()
        if getattr(error, "msg", "") == "Extra data" and first.endswith("}"):
            yield from _json_lines(path, text, key)  # under the wrong name
            return
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if isinstance(found, dict):
        yield from _object(found, key)
        return
    for number, record in enumerate(found if isinstance(found, list) else [found], 1):
        yield f"record {number}", record


def _object(found: dict[str, Any], key: str) -> Found:
    """The records of an object: the one list it holds, or itself: records by name, or texts."""
    lists = [found[name] for name in _LISTS if isinstance(found.get(name), list)]
    if len(lists) == 1:
        yield from ((f"record {number}", record) for number, record in enumerate(lists[0], 1))
    elif found and all(isinstance(value, dict) or _is_text(value) for value in found.values()):
        for name, value in found.items():
            own = value if isinstance(value, dict) else {"text": value}
            yield f"record {name!r}", {key: name, **own}
    else:
        yield "record 1", found


def _is_text(value: Any) -> bool:
    """Whether it is a text, or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _parquet(path: Path) -> Found:
    require(f"reading {path.name}", "train", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a complete parquet file ({error})") from None
