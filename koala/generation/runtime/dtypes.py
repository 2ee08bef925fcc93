"""The dtypes that a model can compute in, and which of them a device has."""

import torch

from koala.errors import UserError, unknown
from koala.utils.device import has_bf16

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    """fp32, fp16 or bf16 as PyTorch's. UserError for any other name."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """UserError for a dtype that the device lacks, or only emulates."""
    named = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype == torch.float16:
        raise UserError(f"dtype {named}: no CPU computes in it; choose fp32 or bf16")
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_bf16():
        raise UserError(f"dtype {named}: this CPU has none; choose fp32")
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"dtype {named}: {torch.cuda.get_device_name(device)} has none; choose fp16"
        )
