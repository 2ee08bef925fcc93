"""A LoRA to be trained: what is frozen, in which dtype, and how its files are named."""

import pytest
import torch

from koala.distillation.optimizers import trained_parameters
from koala.distillation.precision import computing
from koala.lora.names import shapes
from koala.lora.training import LoraSettings, add_lora
from toy import seeded_unet, toy_inputs
from toy_lora import toy_base


@pytest.mark.parametrize("modules", ["attention", "transformers", "all"])
def test_every_such_module_gets_a_pair(modules):
    unet = seeded_unet()
    before = unet(**toy_inputs()).sample
    add_lora(unet, LoraSettings(rank=2, modules=modules))
    assert torch.equal(unet(**toy_inputs()).sample, before)
    trained = trained_parameters(unet)
    paths = {name.partition(".lora_")[0] for name in trained}
    of_unet = {t.path for t in shapes(toy_base(unet)) if t.part == "unet"}
    ends = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "transformers": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2",
                         "ff.net.0.proj"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2",
                "ff.net.0.proj", "conv1", "conv2"),
    }[modules]  # fmt: skip
    assert paths == {path for path in of_unet if path.endswith(ends)}
    assert len(trained) == 2 * len(paths)


def test_a_base_that_rests_in_bf16_trains_matrices_in_fp32():
    """As on a GPU: the gradient is that of a base in fp32, up to bf16's rounding."""
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        unet = torch.nn.Module.to(seeded_unet(), dtype)
        torch.manual_seed(0)
        add_lora(unet, LoraSettings(rank=2))
        trained = trained_parameters(unet)
        assert all(parameter.dtype == torch.float32 for parameter in trained.values())
        with computing(torch.device("cpu"), torch.bfloat16):
            unet(**toy_inputs()).sample.float().square().mean().backward()
        assert unet(**toy_inputs(dtype)).sample.isfinite().all()  # as a preview is drawn
        gradients[dtype] = torch.cat([p.grad.flatten() for p in trained.values()])
    exact, rounded = gradients[torch.float32], gradients[torch.bfloat16]
    assert (rounded - exact).norm() < 0.05 * exact.norm()
