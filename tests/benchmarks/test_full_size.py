"""The measurement of whole SDXLs, rehearsed at toy size: it runs, compares, and notices."""

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.full_size import check_round_trip, digests, measure_all, table
from toy import toy_pipeline


def test_every_command_is_measured_and_its_output_compared(toy_sdxl, tmp_path):
    figures = measure_all(toy_sdxl, tmp_path, repeats=1)
    assert all(m["bytes"] > 0 and m["peak_mib"] > 1 for m in figures["measured"].values())
    assert set(figures["equal_tensors"]) < set(figures["measured"])
    sdxl = figures["equal_tensors"]["sdxl back to a folder"]
    assert sdxl == len(digests(toy_sdxl)) > figures["equal_tensors"]["koala-700m back to a folder"]
    rows = [line for line in table(figures).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(figures["measured"])


@pytest.mark.parametrize("change", ["value", "dtype", "name"])
def test_a_change_is_noticed(change, tmp_path):
    folder = toy_pipeline(tmp_path / "toy")
    before = digests(folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensor = tensors.pop(name)
    if change == "value":
        tensor.view(-1)[0] += 1
    save_file(
        {
            **tensors,
            name + "x" * (change == "name"): tensor.half() if change == "dtype" else tensor,
        },
        file,
    )
    with pytest.raises(AssertionError):
        check_round_trip(before, digests(folder))
