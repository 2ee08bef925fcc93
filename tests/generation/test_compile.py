"""What makes the U-Net faster leaves its numbers: fused and compiled against plain."""

import itertools
import os

import pytest
import torch

from koala.errors import UserError
from koala.generation.loader import load
from koala.generation.runtime.backends import example
from koala.generation.runtime.compile import compile_blocks, fuse_projections, graphed
from koala.generation.runtime.dtypes import check_dtype
from koala.generation.runtime.fixed_batches import ROWS, in_fixed_batches, one_by_one
from koala.generation.runtime.pytorch import predictor
from koala.generation.samplers import SAMPLERS
from koala.utils.device import device_and_dtype
from stepping import stepped
from toy import toy_pipeline, toy_unet


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return toy_unet("koala").requires_grad_(False)


def answer(unet, side: int = 8):
    return predictor(unet)(*example(unet, 3, side, tokens=5))


@pytest.mark.parametrize("side", [8, 9])
def test_fused_projections_give_the_same_noise(unet, side):
    before, weights = answer(unet, side=side), sum(p.numel() for p in unet.parameters())
    fuse_projections(unet)
    torch.testing.assert_close(answer(unet, side=side), before, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in unet.parameters()) == weights
    assert not any(name.endswith(("to_k", "to_v")) for name, _ in unet.named_modules())


def test_fusing_refuses_what_it_would_drop(unet):
    attention = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    handle = attention.to_v.register_forward_hook(lambda module, inputs, output: 2 * output)
    before = answer(unet)
    with pytest.raises(UserError, match="merge the LoRA"):
        fuse_projections(unet)
    assert torch.equal(answer(unet), before)  # nothing was fused before it was refused
    handle.remove()
    fuse_projections(unet)
    with pytest.raises(UserError, match="projections that are fused"):
        fuse_projections(unet)


def test_compiled_blocks_give_the_same_noise(unet, monkeypatch, tmp_path):
    # That every block is one whole graph is what can fail here; inductor would take minutes.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    before = answer(unet)
    fuse_projections(unet)
    blocks = compile_blocks(unet, backend="eager")
    assert blocks == 6 + 9  # transformer blocks and resnets
    torch.testing.assert_close(answer(unet), before, atol=1e-5, rtol=0)


def test_the_compiler_keeps_its_work_in_the_cache_folder(unet, monkeypatch, tmp_path):
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compile_blocks(unet)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


def test_graphs_are_for_cuda():
    with pytest.raises(UserError, match="cpu"):
        graphed(lambda x, t, c: x, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_replayed_graph_gives_the_same_noise_for_every_input(unet):
    unet = unet.cuda()
    plain, replayed = predictor(unet), graphed(predictor(unet), unet.device)
    for rows in (2, 3, 2):
        x, timesteps, condition = example(unet, rows, tokens=5)
        for moved in (x, 2 * x):
            torch.testing.assert_close(
                replayed(moved, timesteps, condition), plain(moved, timesteps, condition)
            )


@pytest.mark.parametrize("rows", [1, 3, 5, 9])
def test_batches_of_fixed_sizes_give_the_same_noise(unet, rows):
    plain, seen = predictor(unet), []

    def watched(x, timesteps, condition):
        parts = (condition.text, condition.pooled, condition.time_ids)
        seen.append([len(part) for part in (x, timesteps, *parts)])
        return plain(x, timesteps, condition)

    asked = example(unet, rows, tokens=5)
    fixed = in_fixed_batches(watched, sizes=(1, 2, 4))
    torch.testing.assert_close(fixed(*asked), plain(*asked), atol=1e-5, rtol=0)
    assert seen == [[n] * 5 for n in {1: [1], 3: [4], 5: [4, 1], 9: [4, 4, 1]}[rows]]
    assert all(b <= 1.5 * a or b == a + 1 for a, b in itertools.pairwise(ROWS))


def test_images_are_decoded_one_by_one():
    seen = []

    def decode(latents):
        seen.append(len(latents))
        return 2 * latents

    z = torch.randn(3, 4, 2, 2)
    assert torch.equal(one_by_one(decode)(z), 2 * z) and seen == [1, 1, 1]


def test_a_model_is_where_its_first_parameter_is(unet):
    assert (
        device_and_dtype(unet) == (unet.device, unet.dtype) == (torch.device("cpu"), torch.float32)
    )
    assert device_and_dtype(unet.half().to("meta")) == (torch.device("meta"), torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_host_never_waits_for_the_device_between_steps(tmp_path):
    """Of every sampler, with guidance: a copy or a question that waits is an error in this mode."""
    pipeline = load(toy_pipeline(tmp_path / "toy", architecture="koala"), "cuda")
    for name in SAMPLERS:
        with torch.inference_mode():
            rows = [pipeline.begin(r) for r in pipeline.requests(["a", "b"], scheduler=name)]
            torch.cuda.set_sync_debug_mode("error")
            try:
                stepped(pipeline, rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_dtypes_that_a_processor_lacks_are_refused(monkeypatch):
    cpu = torch.device("cpu")
    check_dtype(torch.float32, cpu)
    with pytest.raises(UserError, match="float16"):
        check_dtype(torch.float16, cpu)
    monkeypatch.setattr("koala.generation.runtime.dtypes.has_bf16", lambda: False)
    with pytest.raises(UserError, match="bfloat16"):
        check_dtype(torch.bfloat16, cpu)
