"""The classes of diffusers and transformers that a model is made of, imported without the rest.

Import them from here: then a drawing loads no compiler, no peft, no scipy and no other models.
What is deferred here are modules that those classes never call while they draw; a version of a
library that asks for other names runs them at once, which is slower and else the same.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from koala.utils.deferred import (
    Alone,
    Deferral,
    called_later,
    class_later,
    deferred,
    itself,
    marked_later,
    of,
    packages_listed_later,
    version_of,
    wrapped_later,
)

_PEFT: dict[str, Deferral] = {
    "peft": {},
    "peft.tuners": {},
    "peft.tuners.tuners_utils": {"BaseTunerLayer": class_later},
}
_REST: dict[str, Deferral] = {
    **_PEFT,
    "diffusers.hooks": Alone(),
    "diffusers.hooks.group_offloading": {
        "_maybe_remove_and_reapply_group_offloading": called_later,
        "_get_group_onload_device": called_later,
    },
    "diffusers.models.autoencoders": Alone(),
    "diffusers.models.controlnets": Alone(),
    "diffusers.models.transformers": Alone(),
    "diffusers.models.unets": Alone(),
    "diffusers.quantizers": Alone(
        DiffusersAutoQuantizer=of("diffusers.quantizers.auto", class_later),
        DiffusersQuantizer=of("diffusers.quantizers.base", class_later),
    ),
    "diffusers.utils.dynamic_modules_utils": {"get_class_from_dynamic_module": called_later},
    "diffusers.utils.remote_utils": {"remote_decode": called_later},
    "diffusers.utils.loading_utils": dict.fromkeys(
        ("get_module_from_name", "get_submodule_by_name", "load_image", "load_video"), called_later
    ),
    "scipy.integrate": {},
    "scipy.optimize": {"linear_sum_assignment": called_later},
    "scipy.stats": {},
    "torch._dynamo": {
        "allow_in_graph": marked_later,
        "assume_constant_result": marked_later,
        "disable": wrapped_later,
    },
    "torch._dynamo._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": class_later},
    "torch.distributed._composable.fsdp": {"fully_shard": called_later},
    "torch.distributed.checkpoint": {},
    "torch.distributed.checkpoint.hf_storage": {
        "HuggingFaceStorageReader": class_later,
        "HuggingFaceStorageWriter": class_later,
    },
    "torch.distributed.fsdp": {
        "CPUOffloadPolicy": class_later,
        "MixedPrecisionPolicy": class_later,
    },
    "torch.distributed.tensor": dict.fromkeys(
        ("DTensor", "Partial", "Replicate", "Shard"), class_later
    )
    | {"distribute_tensor": called_later},
    "torch.distributed.tensor._utils": {"compute_local_shape_and_global_offset": called_later},
    "torch.distributed.tensor.placement_types": dict.fromkeys(
        ("Shard", "_StridedShard"), class_later
    ),
    "transformers": Alone(
        __version__=version_of,
        AutoImageProcessor=of("transformers.models.auto.image_processing_auto", class_later),
        CLIPTextModel=of("transformers.models.clip.modeling_clip", class_later),
        CLIPTextModelWithProjection=of("transformers.models.clip.modeling_clip", class_later),
        PreTrainedModel=of("transformers.modeling_utils", class_later),
    ),
    "transformers.distributed.expert_parallel": {"apply_expert_parallelism": called_later},
    "transformers.distributed.tensor_parallel": dict.fromkeys(
        ("apply_tensor_parallelism", "gather_state_dict_for_save", "verify_tp_plan"), called_later
    ),
    "transformers.models": Alone(),
    "transformers.feature_extraction_utils": {"FeatureExtractionMixin": class_later},
    "transformers.image_processing_utils": {"ImageProcessingMixin": class_later},
    "transformers.processing_utils": {
        "ProcessorMixin": class_later,
        "Unpack": of("typing_extensions", itself),
    },
    "transformers.video_processing_utils": {"BaseVideoProcessor": class_later},
    "transformers.quantizers": Alone(
        HfQuantizer=of("transformers.quantizers.base", class_later),
    ),
    "transformers.generation.continuous_batching": {"PagedAttentionCache": class_later},
    "transformers.generation.continuous_batching.cache": {"PagedAttentionCache": class_later},
    "trio": {},
}

with deferred(_REST), packages_listed_later():
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.models.upsampling import Upsample2D
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import (
        CLIPEncoderLayer,
        CLIPTextEmbeddings,
        CLIPTextModel,
        CLIPTextModelWithProjection,
    )
    from transformers.models.clip.tokenization_clip import CLIPTokenizer
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@contextmanager
def without_peft() -> Iterator[None]:
    """diffusers' U-Net imports peft at each call, if it is installed: not inside this block.

    Nothing changes for a program that has imported peft.
    """
    with nullcontext() if "peft" in sys.modules else deferred(_PEFT):
        yield


__all__ = [
    "Attention",
    "AutoencoderKL",
    "AutoencoderTiny",
    "BasicTransformerBlock",
    "CLIPEncoderLayer",
    "CLIPTextConfig",
    "CLIPTextEmbeddings",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "ConfigMixin",
    "ControlNetModel",
    "Downsample2D",
    "PreTrainedTokenizerBase",
    "ResnetBlock2D",
    "UNet2DConditionModel",
    "Upsample2D",
    "without_peft",
]
