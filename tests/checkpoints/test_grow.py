"""Growing: the teacher draws exactly what its cut draws, and cutting it gives the cut back."""

import pytest
import torch

from koala.architectures.block_map import tensor_map
from koala.architectures.config import from_unet_config
from koala.architectures.table import student_of
from koala.checkpoints.grow import grow
from koala.errors import UserError
from toy import TEXT_WIDTHS, toy_unet


@pytest.fixture(scope="module")
def cut():
    torch.manual_seed(3)
    return toy_unet("koala")


def test_the_grown_teacher_computes_what_its_cut_does(cut):
    arch = from_unet_config(toy_unet("sdxl").config)
    grown = grow(cut, arch).eval()
    assert from_unet_config(grown.config) == arch
    x, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 40), torch.randn(2, TEXT_WIDTHS[1])
    given = (x, torch.tensor([3.0, 700.0]), text)
    added = {"text_embeds": pooled, "time_ids": torch.rand(2, 6) * 64}
    with torch.no_grad():
        ours, theirs = (net(*given, added_cond_kwargs=added).sample for net in (grown, cut))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    names, weights, small = (
        tensor_map(arch, student_of(arch, "koala-700m")),
        *(net.state_dict() for net in (grown, cut)),
    )
    assert all(torch.equal(weights[theirs], small[mine]) for mine, theirs in names.items())


def test_every_new_weight_can_learn(cut):
    grown = grow(cut, from_unet_config(toy_unet("sdxl").config)).train()
    optimizer = torch.optim.SGD(grown.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    for step in range(4):  # a layer behind a zero learns once the zero has moved
        torch.manual_seed(step)
        added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.rand(2, 6)}
        out = grown(
            torch.randn(2, 4, 8, 8), torch.tensor([9.0, 500.0]), torch.randn(2, 5, 40),
            added_cond_kwargs=added,
        ).sample  # fmt: skip
        (out - torch.randn_like(out)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [n for n, p in grown.named_parameters() if torch.equal(p, before[n])] == []


def test_only_a_cut_can_grow(cut):
    with pytest.raises(UserError, match="cannot inherit"):
        grow(toy_unet("sdxl"), from_unet_config(cut.config))
