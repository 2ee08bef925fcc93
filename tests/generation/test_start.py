"""What a drawing imports: only what draws."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "sympy",
    "peft",
    "scipy.optimize",
    "scipy.stats",
    "diffusers.pipelines",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.unets.unet_3d_condition",
    "transformers.generation.continuous_batching",
    "diffusers.quantizers.auto",
    "diffusers.utils.dynamic_modules_utils",
    "gguf",
    "transformers.image_processing_utils",
    "transformers.processing_utils",
    "trio",
    "matplotlib",
    "pyarrow",
)
MOST = 2050  # modules, with all that the tests install; 1985 in benchmarks/start.json
_DRAW = """
import json, sys
from koala.cli import main
status = main(["generate", "a fox", "--steps", "2", *sys.argv[2:], "--out", sys.argv[1]])
print(json.dumps([status, sorted(sys.modules)]))
"""


def python(code, *arguments):
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("asked", [["--backend", "torch"], []], ids=["asked", "by default"])
def test_drawing_imports_no_compiler_no_peft_and_no_other_models(tmp_path, asked):
    status, modules = python(_DRAW, str(tmp_path / "fox.png"), *asked)
    assert status == 0 and (tmp_path / "fox.png").is_file()
    assert not {*modules} & {*HEAVY}
    assert not asked or len(modules) <= MOST
    others = {name.split(".")[2] for name in modules if name.startswith("transformers.models.")}
    assert others <= {"auto", "clip", "encoder_decoder"}  # configurations alone, but clip


_ALL_THERE = """
import json, sys
import koala.utils.networks as networks
from koala.utils.deferred import mark
from transformers import CLIPTextModel, PreTrainedModel
real = [CLIPTextModel is networks.CLIPTextModel, issubclass(CLIPTextModel, PreTrainedModel)]
import diffusers.loaders.lora_base, diffusers.utils.import_utils, importlib.metadata
encoder = networks.CLIPTextModel.__new__(networks.CLIPTextModel)
known = [isinstance(one, diffusers.loaders.lora_base.PreTrainedModel) for one in (encoder, 1)]
import transformers, transformers.tokenization_utils_fast  # which its own code alone can find
listed = importlib.metadata.packages_distributions()
import peft, peft.utils, scipy.stats, scipy.optimize, torch
import torch._dynamo.config, torch.distributed.fsdp._fully_shard
from diffusers.models.transformers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer
import diffusers, transformers
mark()
before = networks.BasicTransformerBlock
compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
from diffusers.models.attention import BasicTransformerBlock
from diffusers.hooks.group_offloading import apply_group_offloading
lora = peft.get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"])
)
from diffusers.loaders import lora_base
layer = lora.base_model.model[0]
print(json.dumps([
    before is BasicTransformerBlock,
    isinstance(layer, lora_base.BaseTunerLayer),
    isinstance(lora, lora_base.BaseTunerLayer),
    networks.UNet2DConditionModel is diffusers.UNet2DConditionModel,
    networks.CLIPTextModel is transformers.CLIPTextModel,
    compiled.shape[1],
    networks.AutoencoderKL is diffusers.AutoencoderKL,
    [*real, PreTrainedModel.__module__],
    known,
    type(listed) is dict and listed["torch"] == diffusers.utils.import_utils._package_map["torch"],
    transformers.__version__ == importlib.metadata.version("transformers"),
    issubclass(
        transformers.CLIPImageProcessor,
        transformers.models.auto.image_processing_auto.ImageProcessingMixin,
    ),
    diffusers.quantizers.PipelineQuantizationConfig.__name__,
]))
"""


def test_what_was_deferred_is_all_there_for_others():
    assert python(_ALL_THERE) == [
        True, True, False, True, True, 2, True,
        [True, True, "transformers.modeling_utils"], [True, False], True, True, True,
        "PipelineQuantizationConfig",
    ]  # fmt: skip
