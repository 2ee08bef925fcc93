"""Memory as Windows tells it: the records that it fills, and their sizes in its documentation."""

import ctypes
import sys

import pytest

from koala.utils.windows import MemoryStatus, ProcessMemory, memory_status, process_memory


def test_the_records_have_the_sizes_that_windows_fills():
    assert ctypes.sizeof(MemoryStatus) == 64
    assert ctypes.sizeof(ProcessMemory) == 8 + 8 * ctypes.sizeof(ctypes.c_size_t)


@pytest.mark.skipif(sys.platform != "win32", reason="asks Windows")
def test_windows_tells_its_memory():
    status, mine = memory_status(), process_memory()
    assert 0 < status.available <= status.total
    assert 0 < mine.resident <= mine.most_resident < status.total
