"""The message for a name that is not among those allowed."""

import pytest

from koala.errors import did_you_mean, unknown


def test_it_lists_what_is_allowed_and_asks_for_what_is_close():
    error = unknown("student", "koala-700", ("koala-1b", "koala-700m"), ", or depths")
    assert str(error) == (
        "unknown student 'koala-700': choose koala-1b, koala-700m, or depths; "
        "did you mean koala-700m?"
    )
    assert str(unknown("dtype", 8, ("fp32",))) == "unknown dtype 8: choose fp32"


@pytest.mark.parametrize(
    ("value", "close"),
    [("EULER", "euler"), ("eulr", "euler"), ("dw-1", "DW-1"), ("heun", ""), ("", "")],
)
def test_the_closest_name_whatever_its_case(value, close):
    asked = f"; did you mean {close}?" if close else ""
    assert did_you_mean(value, ("euler", "lcm", "DW-1")) == asked
