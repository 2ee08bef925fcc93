"""The rate that the progress bar shows."""

import re

from rich.progress import Progress

from koala.utils.progress import WINDOW, _Rate


def shown(times_and_counts, total: int = 64, done: int = 0) -> float:
    """The rate after work arrives in these bursts, by a clock of our own."""
    clock = [0.0]
    bar = Progress(disable=True, get_time=lambda: clock[0])
    task = bar.add_task("drawing", total=total, completed=done)
    for at, count in times_and_counts:
        clock[0] = at
        bar.update(task, advance=count)
    text = _Rate("images", done).render(bar.tasks[0]).plain
    return float(re.fullmatch(r"([\d.]+) images/s", text)[1])


def test_bursts_count_by_the_time_since_the_start():
    assert shown([(8.0, 32), (8.0001, 32)]) == 8.0
    assert shown([(4.0, 8), (4.0001, 8)]) == 4.0  # not yet finished
    assert shown([(8.0, 16), (8.0001, 16)], done=32) == 4.0  # a resumed run


def test_a_long_run_shows_the_rate_of_its_last_half_minute():
    slow, fast = [(float(t), 1) for t in range(1, 61)], [(60 + t / 10, 1) for t in range(1, 301)]
    assert 9.5 < shown([*slow, *fast], total=1000) < 10.5 and WINDOW == 30
