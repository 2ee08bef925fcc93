"""What several benchmarks are tried on."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.checkpoints.bundled import BUNDLED


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """The bundled student's teacher, its U-Net as initialised."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(BUNDLED / "koala-mini", folder, ignore=shutil.ignore_patterns("unet"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel(**unet_config(get("sdxl-mini"))).save_pretrained(folder / "unet")
    return folder
