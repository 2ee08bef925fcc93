"""Weights that come and go: the same bits come out, and they are really away in between."""

import pytest
import torch
from torch import nn

from koala.generation.memory.offload import (
    UNITS,
    GroupOffload,
    ModelOffload,
    OneAtATime,
    aligned_size,
    tensors_of,
    units_of,
)
from koala.generation.quantise import quantise
from toy import seeded_unet, toy_inputs, toy_text_encoders, toy_vae

CPU = torch.device("cpu")


def bytes_held(models: list[nn.Module]) -> int:
    """Bytes of the storages behind the models' tensors; a storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(models)}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.fixture(params=["as they are", "channels last", "int8"])
def unet(request):
    model = seeded_unet()
    if request.param == "channels last":
        model = model.to(memory_format=torch.channels_last)
    if request.param == "int8":
        quantise(model.to(memory_format=torch.channels_last), "int8")
    return model


@pytest.mark.parametrize("kind", [ModelOffload, GroupOffload])
def test_an_offloaded_u_net_predicts_the_same_bits_again_and_again(unet, kind):
    with torch.inference_mode():
        expected = unet(**toy_inputs()).sample
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    device, part = OneAtATime(), kind([unet], CPU)
    device.add(part, [unet])
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                assert torch.equal(unet(**toy_inputs()).sample, expected)
        device.clear()
    device.release()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == before[name].stride()
    with torch.inference_mode():
        assert torch.equal(unet(**toy_inputs()).sample, expected)  # an ordinary model again


def test_weights_are_off_the_device_between_calls(unet):
    whole, units = aligned_size(tensors_of([unet])), aligned_size(tensors_of(units_of(unet)))
    part = ModelOffload([unet], CPU)
    scalars = 8 * len(tensors_of([unet]))  # what stands for an absent weight: one number
    assert bytes_held([unet]) <= whole - units + scalars
    part.onload()
    assert bytes_held([unet]) >= units
    part.offload()
    assert bytes_held([unet]) <= whole - units + scalars


def test_group_offload_holds_two_units_at_most(unet):
    """Watched from inside: at each unit's turn, what the model's tensors hold."""
    whole = aligned_size(tensors_of([unet]))
    offloaded = GroupOffload([unet], CPU)
    sizes = sorted(unit.size for unit in offloaded.units)
    rest = whole - sum(sizes)
    seen = []
    for module in units_of(unet):
        module.register_forward_hook(lambda *_: seen.append(bytes_held([unet])))
    device = OneAtATime()
    device.add(offloaded, [unet])
    with torch.inference_mode():
        for _ in range(2):
            unet(**toy_inputs())
    scalars = 8 * len(tensors_of([unet]))
    assert len(seen) == 2 * len(offloaded.units)
    assert max(seen) <= rest + 2 * sizes[-1] + scalars


def test_one_part_is_on_the_device_and_inputs_go_along():
    vae, encoders = toy_vae().requires_grad_(False), toy_text_encoders()
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.inference_mode():
        expected = vae.decode(z).sample, encoders[0](ids).last_hidden_state
        device, first, second = OneAtATime(), ModelOffload([vae], CPU), GroupOffload(encoders, CPU)
        device.add(first, [vae.decoder.conv_in])
        device.add(second, encoders)
        for _ in range(2):
            assert torch.equal(vae.decode(z).sample, expected[0])
            full = bytes_held([vae])
            assert torch.equal(encoders[0](ids).last_hidden_state, expected[1])
            assert bytes_held([vae]) < full / 2


def test_units_do_not_overlap_and_leave_little():
    for model in (seeded_unet(), toy_vae(), *toy_text_encoders()):
        units = units_of(model)
        inside = [m for unit in units for m in unit.modules() if m is not unit]
        assert units and not set(units) & set(inside)
        assert all(isinstance(unit, UNITS) for unit in units)
        assert aligned_size(tensors_of(units)) > 0.7 * aligned_size(tensors_of([model]))
