"""Memory as Windows tells it, which has neither /proc nor `os.sysconf`. Not tried on one yet."""

import ctypes
import sys


class MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX, of 64 bytes."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended", ctypes.c_uint64),
    )


class ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS, of 72 bytes where pointers have 8."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("most_resident", ctypes.c_size_t),
        ("resident", ctypes.c_size_t),
        ("rest", ctypes.c_size_t * 6),
    )


def memory_status() -> MemoryStatus:
    """The machine's memory, in bytes."""
    if sys.platform != "win32":
        raise AssertionError("asks Windows")
    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise ctypes.WinError()
    return status


def process_memory() -> ProcessMemory:
    """This process's memory, in bytes."""
    if sys.platform != "win32":
        raise AssertionError("asks Windows")
    kernel = ctypes.windll.kernel32
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    found = ProcessMemory(length=ctypes.sizeof(ProcessMemory))
    process, length = kernel.GetCurrentProcess(), ctypes.sizeof(found)
    if not kernel.K32GetProcessMemoryInfo(process, ctypes.byref(found), length):
        raise ctypes.WinError()
    return found
