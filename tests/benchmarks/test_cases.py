"""Every case that people reported, and its neighbours, answers as it should."""

import pytest

from benchmarks.case_inputs import CHECKPOINTS, FOLDERS, LORAS, PICTURES
from benchmarks.cases import ROWS, Desk


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    with pytest.MonkeyPatch.context() as patch:  # the desk sets both
        patch.setenv("KOALA_CACHE", "")
        patch.setenv("KOALA_BACKEND", "")
        yield Desk(tmp_path_factory.mktemp("desk"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_answered_as_it_should_be(desk, row):
    answer = desk.ask(row)
    assert answer.good, answer


def test_every_report_is_there_once_and_every_input_is_used():
    assert {row.case for row in ROWS} == {*range(1, 28)}
    assert len({row.name for row in ROWS}) == len(ROWS)
    words = " ".join(word for row in ROWS for word in row.command)
    for kind, names in (("checkpoint", CHECKPOINTS), ("folder", FOLDERS), ("lora", LORAS)):
        unused = {name for name in names if f"{{{kind} {name}}}" not in words}
        assert unused <= {"plain"}, unused
    assert {name for name in PICTURES if f"{{picture {name}}}" not in words} == set()
