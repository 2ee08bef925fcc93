"""The progress bar of all long-running work: share, rate and time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

WINDOW = 30.0  # seconds over which rich measures the rate


class _Rate(ProgressColumn):
    """Of the last half minute, and in the first one and at the end of the whole run.

    What is done arrives in bursts, such as a whole batch: the time between two would say nothing.
    """

    def __init__(self, unit: str, done: int):
        super().__init__()
        self.unit, self.done = unit, done

    def render(self, task: Task) -> Text:
        speed, elapsed = task.speed, task.finished_time or task.elapsed
        if elapsed and (task.finished or elapsed < WINDOW):
            speed = (task.completed - self.done) / elapsed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else f"- {self.unit}/s")


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0, silent: bool = False) -> Iterator:
    """Yields advance(n, note=""), to call as work is done; drawn on stderr.

    silent: draws nothing, as in all but the first process of a run.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit, done),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=silent) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(n: int, note: str = "") -> None:
            bar.update(task, advance=n, note=note)

        yield advance
