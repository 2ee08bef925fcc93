"""docs/extend.md, typed in from top to bottom: what is added works beside what is there."""

import json
import re
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from koala.evaluation.metrics import catalogue
from koala.generation import load, samplers
from toy_server import running
from toy_sources import image

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
SECTIONS = re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.M)


@pytest.fixture
def desk(tmp_path, toy_sdxl, monkeypatch) -> Path:
    """A folder with what the page names; the tables of samplers are as before afterwards."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "sdxl").symlink_to(toy_sdxl)
    with zipfile.ZipFile(tmp_path / "animals.zip", "w") as archive:
        for n in range(24):
            archive.writestr(f"a fox, number {n}.jpg", image(n))
    for table in ("SAMPLERS", "BY_NAME"):
        monkeypatch.setattr(samplers, table, dict(getattr(samplers, table)))
    monkeypatch.setattr(catalogue, "METRICS", dict(catalogue.METRICS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_works(desk, toy_sdxl, capsys):
    assert [what for what, _ in SECTIONS] == [
        "A sampler", "A data source", "A recipe", "A metric", "An API route",
    ]  # fmt: skip
    names: dict = {"__name__": "extend"}
    with running(load(toy_sdxl, "cpu"), desk / "served") as server:
        names["app"] = server.app
        for what, block in SECTIONS:
            exec(compile(block, f"extend.md, {what}", "exec"), names)
        with urlopen(f"{server.url}/v1/samplers") as answer:
            said = json.load(answer)
    assert said == {"model": "sdxl", "samplers": [*samplers.SAMPLERS]}
    assert "lms" in said["samplers"]
    euler, lms = (
        names["pipeline"]("a fox, noto style", scheduler=name, seed=7).images[0].tobytes()
        for name in ("euler", "lms")
    )
    assert names["image"].tobytes() == lms != euler
    assert names["made"].kept == 24 and "24" in capsys.readouterr().out
    run = json.loads((desk / "runs" / "with-cross-attention" / "run.json").read_text())
    assert {tap["location"] for tap in run["recipe"]["settings"]["taps"]} == {"sa", "ca"}
    assert (names["model"] / "unet" / "config.json").is_file()


def test_the_pages_metric_is_what_one_can_tell_by_hand(monkeypatch):
    monkeypatch.setattr(catalogue, "METRICS", dict(catalogue.METRICS))
    names: dict = {}
    code = dict(SECTIONS)["A metric"].partition("metric = ")[0]
    exec(compile(code, "extend.md", "exec"), names)
    precision = names["Precision"](names["METRICS"]["precision"]).distance
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(50, 8, generator=generator)
    assert precision(real, real) == 1
    assert precision(real + 100, real) == 0
    half = torch.cat([real[:10], real[:10] - 100])
    assert precision(half, real) == 0.5


def test_the_pages_sampler_nears_the_limit_sooner_than_eulers():
    """dx/dsigma = (x - denoised) / sigma with denoised = x - sigma cos(sigma): x is sin(sigma)."""
    names: dict = {}
    code = dict(SECTIONS)["A sampler"].partition("samplers.SAMPLERS")[0]
    exec(compile(code, "extend.md", "exec"), names)
    errors = {}
    for kind in (samplers.Euler, names["LMS"]):
        sampler = kind.__new__(kind)
        sampler.sigmas = torch.linspace(3, 1, 41).tolist()
        x = torch.tensor(sampler.sigmas[0]).double().sin()
        for i, sigma in enumerate(sampler.sigmas[:-1]):
            x = sampler.step(i, x, x - sigma * torch.tensor(sigma).double().cos())
        errors[kind.name] = abs(float(x) - float(torch.tensor(1.0).double().sin()))
    assert errors["LMS"] < errors["Euler"] / 10
