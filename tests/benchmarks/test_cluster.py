"""The played cluster's judgement: losses beside each other, samples lost or repeated.

Processes, shards, a kill and resuming are run in tests/distillation/test_parallel.py.
"""

import json
from pathlib import Path

import pytest

from benchmarks import cluster


def run(folder: Path, numbers: list[int], change: float = 0.0) -> Path:
    """A run that logged after these batches; its losses are 1 + change."""
    folder.mkdir()
    lines = [
        {"samples": n * cluster.BATCH, **dict.fromkeys(cluster.TERMS, 1 + change)} for n in numbers
    ]
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_greatest_difference_of_every_term_is_told(tmp_path):
    plain = run(tmp_path / "plain", [1, 2, 3])
    found = cluster.compared(run(tmp_path / "ours", [1, 2, 3], 2e-5), plain)
    assert found.pop("samples") == 3 * cluster.BATCH
    assert found == pytest.approx(dict.fromkeys(cluster.TERMS, 2e-5))


@pytest.mark.parametrize("numbers", [[1, 3], [1, 2], [1, 2, 2, 3]])
def test_samples_that_are_lost_or_repeated_are_seen(tmp_path, numbers):
    plain = run(tmp_path / "plain", [1, 2, 3])
    with pytest.raises(SystemExit, match="samples were lost or repeated"):
        cluster.compared(run(tmp_path / "ours", numbers), plain)
