"""Optimisers: their moments come back bit for bit."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from koala.distillation import checkpoint
from koala.distillation.ema import EMA
from koala.distillation.optimizers import make_moments, new_optimizer, plain_parts, set_rate
from koala.distillation.settings import Training
from koala.errors import UserError


@pytest.fixture
def eager():
    """torchao compiles its step; what is tested is how its moments are kept, so it need not."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def settings(optimizer: str) -> Training:
    return Training(samples=8, batch=4, lr=1e-2, optimizer=optimizer)


def learner(optimizer: str) -> checkpoint.State:
    """64 x 64 weights: as many as torchao keeps in 8 bits, and no fewer."""
    torch.manual_seed(0)
    module = nn.Linear(64, 64, bias=False)
    return checkpoint.State(module, [EMA(module, 8)], new_optimizer(settings(optimizer), module))


def step(state: checkpoint.State, number: int) -> None:
    g = torch.Generator().manual_seed(number)
    state.module.weight.grad = torch.randn(64, 64, generator=g)
    set_rate(state.optimizer, 1e-2)
    state.optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_moments_come_back_bit_for_bit(tmp_path: Path, name: str, eager: None) -> None:
    """Of torchao's too, which `make test` installs for this file alone (docs/log.md)."""
    if name == "adamw-8bit":
        pytest.importorskip("torchao", reason="needs torchao, as `make test` gives it to this file")
    left, taken_up = learner(name), learner(name)
    for number in range(3):
        step(left, number)
    with checkpoint.Saver(tmp_path, settings(name), write=True) as saver:
        saver.save(12, left, {})
        saver.wait()
    saved = load_file(tmp_path / "checkpoints" / f"{12:012d}" / "state.safetensors")
    width = {value.element_size() for key, value in saved.items() if key.endswith(".codes")}
    assert width == (set() if name == "adamw" else {1})
    assert checkpoint.load(tmp_path / "checkpoints" / f"{12:012d}", taken_up) == (12, {})
    for state in (left, taken_up):
        step(state, 3)
    moments = [s.optimizer.state[s.module.weight] for s in (left, taken_up)]
    assert moments[0].keys() == moments[1].keys()
    kept = {part for moment in moments[0].values() for part in plain_parts(moment)}
    assert kept == ({""} if name == "adamw" else {"", ".codes", ".scale", ".qmap"})
    for key in moments[0]:
        assert type(moments[0][key]) is type(moments[1][key])
        ours, theirs = plain_parts(moments[0][key]), plain_parts(moments[1][key])
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)
    assert torch.equal(left.module.weight, taken_up.module.weight)


def test_making_moments_moves_no_weight_and_only_those_asked_for() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [p.clone() for p in module.parameters()]
    optimizer = new_optimizer(settings("adamw"), module)
    make_moments(optimizer, module[0].parameters())
    assert all(torch.equal(p, was) for p, was in zip(module.parameters(), before, strict=True))
    assert set(optimizer.state) == set(module[0].parameters())
    assert all(p.grad is None for p in module.parameters())


def test_an_optimiser_that_is_not_installed_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not
    with pytest.raises(UserError, match=r"optimizer adamw-8bit: torchao is not installed"):
        learner("adamw-8bit")
