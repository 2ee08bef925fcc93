"""OpenVINO models on a CPU, compiled for each shape of their inputs. Importing this loads no torch.

OpenVINO packs the weights once for the CPU it runs on. Fixed shapes are a third faster than dynamic
ones; the cache folder keeps what was compiled for each.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from koala.utils.asset_packages import cache_folder
from koala.utils.deferred import Alone, Deferral, called_later, deferred
from koala.utils.digest import digest

# OpenVINO and NNCF report their use through this package, if it can be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: not there

# What builds and converts models, which running them does not.
_BUILDING: dict[str, Deferral] = {
    "openvino.tools.ovc": {"convert_model": called_later},
    **{f"openvino.opset{n}": Alone() for n in range(1, 18)},
}
CACHE_BYTES = 16 << 30  # of all models in the cache folder


def openvino_folder() -> Path:
    """Where converted and compiled models are kept."""
    return cache_folder() / "openvino"


@lru_cache(maxsize=1)
def core() -> Any:
    """The only `openvino.Core` of this process, which is never dropped.

    The CPU plugin of a core gives its thread another stack for signals, and takes it away when it
    is dropped. Where cores are dropped in the order in which they were made, or in another thread,
    the thread keeps a stack that is no more, and the next signal, a SIGTERM for example, is a
    segmentation fault (OpenVINO 2026.4).
    """
    with deferred(_BUILDING):
        import openvino

    return openvino.Core()


class Compiled:
    """One model, run in float32, or in bfloat16 with `half`.

    file: its xml. threads: 0 for as many as OpenVINO finds best.
    """

    def __init__(self, file: Path, half: bool = False, threads: int = 0) -> None:
        self.file = file
        self.options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Else what a layer in 4 bits sees is rounded to 8, which is not faster.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            # A pinned thread waits for whatever else runs on its core.
            "ENABLE_CPU_PINNING": False,
        }
        # OpenVINO's cache does not tell options apart: a model compiled for bf16 would be found for
        # fp32. So every set of options has a folder of its own.
        self.options["CACHE_DIR"] = str(openvino_folder() / digest([self.options]))
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Its outputs, for inputs in its order and dtypes."""
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._requests:
            self._requests[shapes] = self._compiled(shapes).create_infer_request()
        answer = self._requests[shapes].infer([*arrays], share_inputs=True)
        return [answer[i] for i in range(len(answer))]

    def _compiled(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        model = core().read_model(self.file)
        model.reshape(dict(enumerate(shapes)))
        compiled = core().compile_model(model, "CPU", self.options)
        trim(openvino_folder(), CACHE_BYTES)
        return compiled


def trim(folder: Path, limit: int) -> None:
    """Deletes the oldest files, also in subfolders, until the rest takes at most `limit` bytes."""
    files = [file for file in folder.rglob("[0-9a-f]*") if file.is_file()]
    total = 0
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        total += file.stat().st_size
        if total > limit:
            file.unlink()
