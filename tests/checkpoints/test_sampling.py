"""What a model is drawn with: written and read back, and known of public few-step models."""

import pytest

from koala.checkpoints.sampling import KEY, Sampling, by_name, of_config
from koala.errors import UserError


def test_it_is_read_back_as_it_was_written():
    sampling = Sampling(2, 1.0, "lcm")
    assert of_config({"beta_start": 0.1, **sampling.to_config()}) == sampling
    assert of_config({"beta_start": 0.1}) is None


@pytest.mark.parametrize(
    "stated",
    [None, 4, {}, {"steps": 4}, {"steps": 0, "guidance": 1, "scheduler": "euler"},
     {"steps": "4", "guidance": 1.0, "scheduler": "euler"}],
)  # fmt: skip
def test_nonsense_is_refused(stated):
    with pytest.raises(UserError, match="_koala_sampling of the scheduler's config is"):
        of_config({KEY: stated})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ByteDance/SDXL-Lightning/sdxl_lightning_8step_unet.safetensors", Sampling(8, 1.0)),
        ("stabilityai/sdxl-turbo", Sampling(4, 1.0)),
        ("Hyper-SDXL-1step-lora.safetensors", Sampling(1, 1.0)),
        ("tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.safetensors", Sampling(4, 1.0, "lcm")),
        ("latent-consistency/lcm-sdxl", Sampling(4, 1.0, "lcm")),
        ("stabilityai/stable-diffusion-xl-base-1.0", None),
        ("etri-vilab/koala-lightning-700m", None),
        ("enlightning.safetensors", None),
    ],
)
def test_few_step_models_are_known_by_their_names(name, expected):
    assert by_name(name) == expected
