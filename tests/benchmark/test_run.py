"""`koala benchmark` at toy size: what it measures, writes and refuses."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import cpu, gpu, gpu_drawing
from benchmarks.gpu_run import Section
from koala.architectures.config import from_unet_config
from koala.architectures.flops import flops
from koala.architectures.layout import parameters as count
from koala.architectures.table import ARCHITECTURES
from koala.benchmark import measure, ways
from koala.benchmark.cases import CASES, GPUS, Subject, subject
from koala.benchmark.drawer import Drawer, RemoteDrawer, image_flops
from koala.benchmark.models import build
from koala.benchmark.plot import plot
from koala.benchmark.ratio import FEWEST, Ratio, ratio
from koala.benchmark.report import BenchmarkReport, BenchmarkRow
from koala.benchmark.run import benchmark
from koala.benchmark.ways import Way, ways_of
from koala.cli import main
from koala.errors import UserError
from koala.generation import load
from koala.utils.counted import counted
from koala.utils.device import resident_bytes

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(toy_sdxl, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOALA_CACHE", str(out.parent / "cache"))
        patch.setenv("KOALA_BACKEND", "torch")
        # As on a processor without bf16, whose ways take as long again.
        patch.setattr(ways, "has_bf16", lambda: False)
        seen = []
        report = benchmark([str(toy_sdxl)], out, "cpu", rounds=2, threads=[1], on_row=seen.append)
    assert seen == report.rows
    return report, out


def test_every_way_is_measured_with_the_same_weights(made):
    report, _ = made
    stock, ours, *others = report.rows
    assert (stock.way, ours.way) == ("diffusers", "koala")
    assert stock.exact and ours.exact and all(not other.exact for other in others)
    assert "koala guided half way" in [other.way for other in others]
    for row in report.rows:
        assert (row.name, row.weights, row.pixels, row.steps) == ("sdxl", "real", 64, 10)
        assert row.threads == 1 and row.backend == "torch"
        assert row.image.runs == 2
        assert 0 < row.image.least <= row.image.median <= row.image.greatest
        assert row.cpu_seconds > 0 and row.unet.median > 0
        assert row.floor == stock.floor > 0
        assert row.peak_gb is None or row.peak_gb > 0.1  # the interpreter and its libraries
        assert row.budgets == {}  # no allocator to hold to a budget
    assert stock.times_faster is None
    pairs = ours.times_faster
    assert pairs.pairs == 2 and pairs.low is None and pairs.verdict() == "cannot be told"


def test_the_same_figures_as_table_csv_json_and_plot(made):
    report, out = made
    stored = json.loads((out / "benchmark.json").read_text())
    assert stored["rows"][1]["image"]["median"] == report.rows[1].image.median
    assert stored["rows"][1]["times_faster"]["pairs"] == 2 and stored["hardware"]
    rows = list(csv.DictReader((out / "benchmark.csv").open()))
    assert [row["way"] for row in rows[:2]] == ["diffusers", "koala (torch)"]
    assert rows[1]["image s"] == f"{report.rows[1].image.median:.3f}"
    table = (out / "benchmark.md").read_text()
    assert rows[1]["image s"] in table
    assert "times as fast as stock diffusers on 1 thread, 2 pairs: cannot be told." in table
    with Image.open(out / "benchmark.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 10
    assert sorted(p.suffix for p in out.iterdir()) == [".csv", ".json", ".md", ".png"]


def test_the_published_table_is_whole():
    assert len(CASES) == 9 and all(len(case.published) == len(GPUS) for case in CASES.values())
    assert CASES["koala-lightning-700m"].published[2] == (0.66, 8.3)
    assert [name for name, case in CASES.items() if case.published[0] is None] == [
        "sdxl-base-1.0",
        "sdxl-turbo",
        "sdxl-lightning",
        "ssd-1b",
    ]
    assert {case.architecture for case in CASES.values()} <= set(ARCHITECTURES)
    assert subject("ssd-1b") == Subject(CASES["ssd-1b"], random=True)
    with pytest.raises(UserError, match="koala-turbo-1b"):
        subject("koala-turbo-2b")


def test_a_model_is_drawn_as_it_is_made_for():
    case = subject("koala-mini-guided").case
    assert (case.pixels, case.steps, case.guidance, case.rows) == (128, 4, 1.0, 1)
    case = subject("koala-mini").case
    assert (case.pixels, case.steps, case.guidance, case.rows) == (128, 10, 3.5, 2)


def test_a_images_operations_are_all_its_evaluations_and_the_decoder(toy_sdxl):
    pipeline, chosen = load(toy_sdxl, "cpu"), subject(str(toy_sdxl))
    one = flops(from_unet_config(pipeline.unet.config), 64, 64, pipeline.conditioner.tokens)
    decoder = image_flops(pipeline, chosen) - 20 * one  # 10 steps, with guidance
    assert 0 < decoder < 20 * one


def test_random_weights_make_a_whole_model_of_the_right_size():
    # On the meta device, which has shapes and no memory: nothing of 3 GB is made here.
    pipeline = build(subject("koala-turbo-700m"), torch.device("meta"), torch.float16)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    assert parameters == count(ARCHITECTURES["koala-700m"])
    encoders = sum(p.numel() for e in pipeline.conditioner.encoders for p in e.parameters())
    assert round(encoders / 1e6, 1) == 817.7  # 123.1 + 694.7
    assert round(sum(p.numel() for p in pipeline.vae.parameters()) / 1e6, 1) == 83.7
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float16}
    assert pipeline.conditioner.tokens == 77 and "random" in pipeline.name


STOCK = """
import sys
from koala.benchmark.drawer import stock
from koala.generation.loader import load
pipeline = load(sys.argv[1], "cpu", backend="torch")
print("diffusers.pipelines.pipeline_utils" in sys.modules)
stock(pipeline)
print("diffusers.pipelines.pipeline_utils" in sys.modules)
"""


def test_stock_diffusers_is_imported_where_it_draws_and_without_a_word(toy_sdxl):
    """Our ways' processes start in a third of the time without it."""
    words = [sys.executable, "-c", STOCK, str(toy_sdxl)]
    done = subprocess.run(words, capture_output=True, check=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")


def test_seconds_are_those_after_the_first_call():
    calls = []
    timed = measure.timing(lambda: calls.append(1), 4, CPU)
    assert len(calls) == 5 and timed.runs == 4
    assert measure.Timing(2.0, 1.0, 4.0, 3).spread == 1.5


@pytest.mark.skipif(measure.peak_bytes(CPU) is None, reason="needs /proc")
def test_the_peak_is_what_was_held_for_a_moment():
    measure.reset_peak(CPU)
    before = resident_bytes()
    torch.ones(64 << 20)  # 256 MiB, given back at once
    assert 200e6 < measure.peak_bytes(CPU) - before < 400e6
    measure.reset_peak(CPU)
    assert measure.peak_bytes(CPU) - before < 100e6


def row(**values):
    known = {"name": "a", "way": "koala", "backend": "torch", "exact": True, "threads": None}
    known |= {"weights": "random", "pixels": 64, "steps": 1, "guidance": 0}
    return BenchmarkRow(**(known | values))


def test_rows_that_did_not_fit_say_so(tmp_path):
    missing = row(name="sdxl-base-1.0", way="diffusers")
    assert missing.cells()["image s"] == "OOM" and missing.claim() is None
    fitted = row(image=measure.Timing(1, 1, 1, 1), budgets={8: None})
    ceilings = measure.Ceilings(1e12, 1e11, "float16")
    report = BenchmarkReport("a card", "cuda", ceilings, [missing, fitted], ["ssd-1b"])
    table = report.table()
    assert "OOM" in table and "in 8 GB" in table and "out of time: ssd-1b" in table
    assert "times as fast" not in table
    assert report.as_dict()["published"]["sdxl-base-1.0"]["4090 24 GB"] == (3.23, 11.9)
    plot(report, tmp_path / "plot.png")


def test_the_time_is_kept(toy_sdxl, tmp_path):
    report = benchmark([str(toy_sdxl)] * 2, tmp_path / "out", "cpu", seconds=0)
    assert report.rows == [] and set(report.left_out) == {"sdxl"}
    assert "out of time" in (tmp_path / "out" / "benchmark.md").read_text()


def test_a_way_that_cannot_draw_here_says_why(toy_sdxl):
    wrong = Way("koala", backend="abacus")
    with pytest.raises(UserError, match="abacus"):
        RemoteDrawer(subject(str(toy_sdxl)), wrong, CPU, "fp32", 1)


def test_the_bundled_models_other_ways_draw():
    """Those that the toy pipeline lacks: a tiny decoder, and bf16 where the processor has it."""
    chosen = subject("koala-mini")
    others = [way for way in ways_of(chosen, on_cpu=True) if way.decode or way.backend]
    assert "koala tiny decode" in [way.name for way in others]
    for way in others:
        drawer = Drawer(chosen, way, CPU, "fp32")
        assert drawer.backend == (way.backend or "torch") and drawer.draw().seconds > 0
        drawer.close()


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_the_interval_of_a_ratio_holds_the_median(seconds):
    found = ratio([2 * each for each in seconds], seconds)
    assert found.median == 2 and found.pairs == len(seconds)
    assert (found.low is None) == (len(seconds) < FEWEST)
    assert found.verdict() == ("cannot be told" if found.low is None else "faster")
    assert found.narrow == (found.low is not None)


def test_a_verdict_needs_an_interval_without_1():
    ones = [1.0] * 20
    noisy = [0.5, 2.0] * 10
    assert ratio(noisy, ones).verdict() == "cannot be told" and not ratio(noisy, ones).narrow
    assert ratio(ones, [1.1] * 20).verdict() == "slower"
    # 20 pairs: the sixth smallest to the sixth largest, 95.9 % (binomial tables)
    found = ratio([float(n) for n in range(1, 21)], ones)
    assert (found.low, found.high) == (6, 15)


def test_ways_are_those_asked_for_or_all(monkeypatch):
    chosen = subject("koala-mini")
    assert [way.name for way in ways_of(chosen, on_cpu=True)].count("koala torch") == 0
    monkeypatch.delenv("KOALA_BACKEND")  # which is "torch" here, as what a person gets
    by_default = [way.name for way in ways_of(chosen, on_cpu=True)]
    assert by_default[:3] == ["diffusers", "koala", "koala torch"]
    on_gpu = [way.name for way in ways_of(chosen, on_cpu=False)]
    assert on_gpu == ["diffusers", "koala", "koala guided half way", "koala tiny decode"]
    assert set(on_gpu) < set(by_default)
    _, asked = ways_of(chosen, True, backend="openvino-bf16")
    assert asked == Way("koala openvino-bf16", exact=False, backend="openvino-bf16")
    _, asked = ways_of(subject("sdxl-turbo"), False, compiled=True, graphs=True)
    assert asked.name == "koala compiled graphs" and asked.exact
    assert [way.name for way in ways_of(subject("sdxl-turbo"), False)] == ["diffusers", "koala"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["koala-giga"], "koala-giga"),
        (["koala-mini", "--rounds", "0"], "rounds"),
        (["koala-mini", "--threads", "1", "99999"], "99999"),
        (["koala-mini", "--device", "abacus"], "abacus"),
        (["koala-mini", "--dtype", "fp16", "--device", "cpu"], "float16"),
        (["koala-mini", "--dtype", "fp7"], "fp7"),
    ],
)
def test_refusals(asked, said, tmp_path, capsys):
    assert main(["benchmark", *asked, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_script_of_all_gpu_figures_is_rehearsed(toy_sdxl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the table's default place
    out = tmp_path / "gpu"
    given = ["--device", "cpu", "--toy", "--model", str(toy_sdxl), "--out", str(out)]
    assert gpu.main(given) == 0
    figures = json.loads((out / "gpu.json").read_text())
    assert list(figures["sections"]) == list(gpu.SECTIONS)
    assert sum(section.seconds for section in gpu.SECTIONS.values()) <= 540 - 20  # and the imports
    for name, entry in figures["sections"].items():
        assert entry["rows"] and "failed" not in entry, name
        assert not any("refused" in row for row in entry["rows"]), name
    rungs = {row["rung"]: row for row in figures["sections"]["ladder"]["rows"]}
    assert set(rungs) == {"stock diffusers", "ours", *(name for name, _ in gpu_drawing.RUNGS)}
    assert rungs["+ compiled blocks"]["noise_error"] < 0.05  # bf16
    trained = figures["sections"]["training"]["rows"]
    assert [row["student"] for row in trained] == ["koala-700m"] * 6 + ["koala-1b"] * 2
    assert all(row["samples_per_s"] > 0 and row["share_of_peak"] > 0 for row in trained)
    assert trained[0]["times"] == 1 and all(row["planned_gb"] > 0 for row in trained[3:])
    fitted = figures["sections"]["training_memory"]["rows"]
    assert [row["vram_gb"] for row in fitted] == [12, 24, 80, "all"]
    lines = list(csv.DictReader((out / "gpu.csv").open()))
    (rate,) = (
        line["value"] for line in lines
        if (line["section"], line["row"], line["figure"]) == ("training", "0", "samples_per_s")
    )  # fmt: skip
    assert float(rate) == trained[0]["samples_per_s"]
    assert f"| {rate} |" in (out / "gpu.md").read_text()
    with Image.open(out / "gpu.png") as image:
        assert image.format == "PNG"
    assert (out / "table" / "benchmark.csv").is_file()


def test_a_section_that_fails_leaves_the_others(toy_sdxl, tmp_path, monkeypatch):
    def fails(run):
        yield {"row": 1}
        raise RuntimeError("no such card")

    def works(run):
        yield {"row": 2.00001}

    def dawdles(run):
        yield {"row": run.left}
        run.until -= 1000
        yield {"row": 3}
        yield {"row": 4}

    sections = {
        "one": Section(1, fails), "two": Section(1, works), "three": Section(8, dawdles),
        "four": Section(990, works),
    }  # fmt: skip
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    out = tmp_path / "gpu"
    given = ["--device", "cpu", "--model", str(toy_sdxl), "--out", str(out)]
    assert gpu.main([*given, "--seconds", "1000"]) == 1
    one, two, three, four = json.loads((out / "gpu.json").read_text())["sections"].values()
    assert one["rows"] == [{"row": 1}] and "no such card" in one["failed"]
    assert two["rows"] == four["rows"] == [{"row": 2.0}]
    assert 7 < three["rows"][0]["row"] < 9  # its share
    assert len(three["rows"]) == 2 and "were over" in three["cut_short"]
    assert gpu.main([*given, "--seconds", "100", "--sections", "four"]) == 0
    (four,) = json.loads((out / "gpu.json").read_text())["sections"].values()
    assert four["rows"] == [] and "needs about 990" in four["left_out"]


@pytest.mark.parametrize("way", ["diffusers fp32", "koala fp32, guided half way", "koala bf16"])
def test_every_way_of_the_processors_benchmark_draws(way, toy_sdxl):
    found = cpu.draw(way, toy_sdxl, 64)
    assert found["seconds"] > 0 and found["peak_gb"] > 0.1  # the interpreter and its libraries


def test_the_figures_of_docs_speed_are_those_of_the_records():
    folder = ROOT / "benchmarks" / "cpu"
    expected, stocks = [], {}
    for row in json.loads((folder / "mini" / "benchmark.json").read_text())["rows"]:
        seconds, pairs = row["image"]["median"], row["times_faster"]
        if pairs is None:
            stocks[row["threads"]] = seconds
            continue
        way = f"by default ({row['backend']})" if row["way"] == "koala" else row["way"][6:]
        figures = [f"{s:.3f}" for s in (stocks[row["threads"]], seconds)]
        figures += [Ratio(**pairs).text(), f"{row['peak_gb']:.2f}"]
        expected.append([f"koala-mini, {way}, {counted(row['threads'], 'thread')}", *figures])
    ways = json.loads((folder / "full_size.json").read_text())["ways"]
    few = json.loads((folder / "few_steps.json").read_text())["ways"]
    rows = [(ways[cpu.STOCK], name, way) for name, way in ways.items() if name != cpu.STOCK]
    for stock, name, way in [*rows, (few[cpu.STOCK], cpu.IN_FEW_STEPS, few[cpu.IN_FEW_STEPS])]:
        seconds = [f"{each['processor_s']:.0f}" for each in (stock, way)]
        figures = [*seconds, f"{way['times_faster_processor']:.2f}", f"{way['peak_gb']:.2f}"]
        expected.append([f"KOALA-700M, {name.removeprefix('koala ')}", *figures])
    page = (ROOT / "docs" / "speed.md").read_text()
    rows = [
        line.split("|")[1:-1]
        for line in page.splitlines()
        if re.match(r"\| (koala-mini|KOALA-700M), ", line)
    ]
    assert [[cell.strip() for cell in row] for row in rows] == expected
    assert f"took {ways[cpu.STOCK]['peak_gb']:.1f} GB" in page
    start = json.loads((ROOT / "benchmarks" / "start.json").read_text())
    beside = start["PyTorch beside busy cores, seconds"]
    assert f"{beside['sleeping']:.1f} s with\nPyTorch so, and {beside['spinning']:.1f} s" in page
    for way in start["ways"].values():
        assert f"{way['seconds']:.1f} s and {way['peak MB'] / 1000:.2f} GB" in page
    assert (ROOT / "benchmarks" / "fidelity" / "fidelity.md").read_text() in page
