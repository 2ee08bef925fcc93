"""What OpenVINO leaves behind in a process: a signal after it must reach its handler."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")

PROGRAM = """
import gc, os, signal, sys
from pathlib import Path
import numpy as np
from koala.generation.runtime.compiled import Compiled
models = [Compiled(Path(sys.argv[1]), threads=n) for n in (1, 2)]
for n in range(2):
    assert np.array_equal(models[n](np.ones((1, 2), np.float32))[0], [[2, 2]])
for n in range(2):
    models[n] = None
    gc.collect()
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_after_models_were_dropped_is_handled(tmp_path: Path) -> None:
    """A core's CPU plugin changes its thread's stack for signals; see `compiled.core`."""
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([1, 2], np.float32)
    openvino.save_model(openvino.Model([ops.add(x, x)], [x]), tmp_path / "twice.xml")
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "twice.xml")]
    settings = {**os.environ, "KOALA_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(program, capture_output=True, text=True, env=settings)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr
