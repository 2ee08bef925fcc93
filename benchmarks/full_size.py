"""Memory and time of `koala compress` and `koala convert` on a whole SDXL, beside a plain copy.

`python -m benchmarks.full_size [--scratch DIR]` makes a random SDXL in fp16 (`random_sdxl`), about
6.9 GB, takes up to 40 GB below DIR, and writes `full_size.json` and `full_size.md` beside this
file. Every command runs in a process of its own, followed at once by `cp` of what it wrote, on
the same disk; both times include bringing the bytes to the disk (fsync). What comes out is compared
with what went in, tensor by tensor, through safetensors' own reader.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.memory_use import idle_with_torch
from benchmarks.random_sdxl import write_random_sdxl
from koala.architectures.block_map import tensor_map
from koala.architectures.table import student_of
from koala.checkpoints.validate import unet_architecture
from koala.utils.device import hardware

MEMORY_BOUND = 1536  # MiB above an interpreter that has imported torch
TIME_BOUND = 2.0  # times a copy
PEAK = (
    "import sys; from pathlib import Path; from koala.cli import main; status = main(sys.argv[1:]);"
    "lines = Path('/proc/self/status').read_text().splitlines();"
    "print([line.split()[1] for line in lines if line.startswith('VmHWM')][0]); sys.exit(status)"
)
Digests = dict[str, tuple[str, tuple[int, ...], str]]  # name -> dtype, shape, hash of the bytes


@dataclass(frozen=True)
class Measured:
    """One command: its output's size, its peak memory, and its times beside those of `cp`.

    seconds, copy_seconds: (until all is on the disk, of a processor), a pair for each repetition.
    """

    command: str
    bytes: int
    peak_mib: float
    seconds: list[tuple[float, float]]
    copy_seconds: list[tuple[float, float]]

    def ratio(self, which: int = 0) -> float:
        """Times a copy: the quotient of the medians over the repetitions."""
        own, copy = (
            statistics.median(pair[which] for pair in times)
            for times in (self.seconds, self.copy_seconds)
        )
        return round(own / copy, 2)


def measure(arguments: list[str], out: Path, repeats: int = 1) -> Measured:
    """Runs `koala ARGUMENTS --out OUT` and copies what it wrote, `repeats` times in turn."""
    seconds, copies, peaks = [], [], []
    command = [*arguments, "--out", str(out)]
    copy = out.with_name("copy")
    for _ in range(repeats):
        remove(out)
        printed, times = timed([sys.executable, "-c", PEAK, *command], out)
        seconds.append(times)
        peaks.append(int(printed.split()[-1]) / 1024)
        copies.append(timed(["cp", "-r", str(out), str(copy)], copy)[1])
        remove(copy)
    shown = " ".join(["koala", *(Path(a).name if "/" in a else a for a in command)])
    size = sum(p.stat().st_size for p in files_of(out))
    return Measured(shown, size, round(max(peaks), 1), seconds, copies)


def timed(command: list[str], out: Path) -> tuple[str, tuple[float, float]]:
    """What a command prints, and its seconds: until `out` is on the disk, and of a processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for file in files_of(out):
        with file.open("rb") as stream:
            os.fsync(stream)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, (round(wall, 4), round(processor, 4))


def files_of(model: Path) -> list[Path]:
    """The files of a folder, or the file itself."""
    return [p for p in model.rglob("*") if p.is_file()] if model.is_dir() else [model]


def remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
        return
    path.unlink(missing_ok=True)


def digests(model: Path) -> Digests:
    """Every tensor of a model folder, by component and name.

    Without the "text_model." before a text encoder's names, which some versions of transformers
    write and others do not.
    """
    found: Digests = {}
    for file in sorted(model.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dict
                tensor = tensors.get_tensor(name)
                content = blake2b(tensor.reshape(-1).view(torch.uint8).numpy())
                key = f"{file.parent.name}/{name.removeprefix('text_model.')}"
                found[key] = (str(tensor.dtype), (*tensor.shape,), content.hexdigest())
    return found


def check_round_trip(before: Digests, after: Digests) -> int:
    """The number of tensors, all equal in name, dtype, shape and every bit."""
    assert before == after, sorted({*before.items()} ^ {*after.items()})[:3]
    return len(after)


def check_student(teacher: Path, of_teacher: Digests, student: Path, cut: str) -> int:
    """The number of tensors, each of them the teacher's that the block map names, bit for bit."""
    arch = unet_architecture(teacher)
    names = tensor_map(arch, student_of(arch, cut))
    expected = {f"unet/{own}": of_teacher[f"unet/{theirs}"] for own, theirs in names.items()}
    expected |= {n: d for n, d in of_teacher.items() if not n.startswith("unet/")}
    return check_round_trip(expected, digests(student))


def measure_all(teacher: Path, scratch: Path, repeats: int) -> dict:
    """Every command on `teacher`, its outputs compared and removed as soon as they can be."""
    of_teacher, rows, equal = digests(teacher), {}, {}
    small, single, back = scratch / "koala-700m", scratch / "sdxl.safetensors", scratch / "back"

    def compress(name: str, source: Path, cut: str, times: int = 1) -> None:
        out = scratch / cut
        rows[name] = measure(["compress", str(source), "--to", cut], out, times)
        equal[name] = check_student(teacher, of_teacher, out, cut)

    def convert(name: str, source: Path, to: str, out: Path, *more: str, times: int = 1) -> None:
        rows[name] = measure(["convert", str(source), "--to", to, *more], out, times)

    compress("compress a folder to koala-700m", teacher, "koala-700m", repeats)
    small_single = scratch / "koala-700m.safetensors"
    convert("koala-700m to a single file", small, "single-file", small_single)
    convert("koala-700m back to a folder", small_single, "diffusers", back)
    equal["koala-700m back to a folder"] = check_round_trip(digests(small), digests(back))
    remove(back)
    for dtype in ("bf16", "fp32"):
        name = f"koala-700m to a single file in {dtype}"
        convert(name, small, "single-file", small_single, "--dtype", dtype)
    remove(small_single)
    remove(small)
    compress("compress a folder to koala-1b", teacher, "koala-1b")
    remove(scratch / "koala-1b")
    convert("sdxl to a single file", teacher, "single-file", single, times=repeats)
    convert("sdxl back to a folder", single, "diffusers", back)
    equal["sdxl back to a folder"] = check_round_trip(of_teacher, digests(back))
    remove(back)
    compress("compress a single file to koala-700m", single, "koala-700m")
    return {
        "command": "python -m benchmarks.full_size",
        "hardware": hardware(),
        "idle_with_torch_mib": idle_with_torch(),
        "teacher_bytes": sum(p.stat().st_size for p in files_of(teacher)),
        "measured": {
            name: asdict(m) | {"ratio": m.ratio(), "processor_ratio": m.ratio(1)}
            for name, m in rows.items()
        },
        "equal_tensors": equal,
    }


def table(figures: dict) -> str:
    """The figures as a Markdown page."""
    idle, teacher = figures["idle_with_torch_mib"], figures["teacher_bytes"] / 1e9
    lines = [
        "# SDXL at full size: memory, time, sizes",
        "",
        f"A random SDXL in fp16, {teacher:.2f} GB, by `{figures['command']}` on",
        f"{figures['hardware']}.",
        "",
        "Seconds include bringing the bytes to the disk, of the command and of `cp` of what it",
        "wrote, on the same disk, right after it. Times a copy is the quotient of their medians,",
        "also of the seconds of a processor, which the disk's other users do not change. Bounds",
        f"set beforehand: {MEMORY_BOUND:,} MiB above the {idle:,.0f} MiB of an interpreter that",
        f"has imported torch and does nothing; {TIME_BOUND:g} times a copy.",
        "",
        "| | output | peak memory | seconds | of a copy | times a copy | of a processor's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in figures["measured"].items():
        own, copy = (", ".join(f"{s:.1f}" for s, _ in m[k]) for k in ("seconds", "copy_seconds"))
        lines.append(
            f"| {name} | {m['bytes'] / 1e9:.2f} GB | {m['peak_mib']:,.0f} MiB | {own} | {copy} | "
            f"{m['ratio']:.2f} | {m['processor_ratio']:.2f} |"
        )
    lines += [
        "",
        "Compared with what went in, bit for bit and through safetensors' own reader:",
        "",
    ]
    lines += [f"- {name}: {n:,} tensors equal" for name, n in figures["equal_tensors"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="a folder for the files (default: temporary)")
    parser.add_argument("--repeats", type=int, default=3, help="of the two main commands")
    options = parser.parse_args()
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        teacher = Path(scratch) / "sdxl"
        write_random_sdxl(teacher)
        figures = measure_all(teacher, Path(scratch), options.repeats)
    (here / "full_size.json").write_text(json.dumps(figures, indent=1) + "\n")
    (here / "full_size.md").write_text(table(figures))
    print(table(figures))
    over = [
        name
        for name, m in figures["measured"].items()
        if m["peak_mib"] > figures["idle_with_torch_mib"] + MEMORY_BOUND or m["ratio"] > TIME_BOUND
    ]
    sys.exit(f"over the bounds: {', '.join(over)}" if over else 0)


if __name__ == "__main__":
    main()
