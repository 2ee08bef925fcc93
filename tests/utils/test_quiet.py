"""transformers says nothing but errors for a while, and then what it said before."""

import pytest
from transformers.utils import logging

from koala.utils.quiet import quiet_transformers


def told():
    return logging.get_verbosity(), logging.is_progress_bar_enabled()


@pytest.mark.parametrize("bars", [True, False])
def test_what_was_said_before_is_said_again(bars):
    level, shown = told()
    show = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    try:
        logging.set_verbosity_info()
        show[bars]()
        with quiet_transformers():
            assert told() == (logging.ERROR, False)
        assert told() == (logging.INFO, bars)
    finally:
        logging.set_verbosity(level)
        show[shown]()
