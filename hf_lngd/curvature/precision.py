"""In which precision a step's products are taken, and what they are taken with is kept."""

from __future__ import annotations

import torch

from ..config import LNGDConfig

# Any of these instructions makes products in bfloat16 faster than in float32. Without one they are emulated: four times
# as slow on a CPU that has AVX-512 alone.
_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
_AMPERE = (8, 0)  # the first CUDA devices with them


def fast_bfloat16(device: torch.device) -> bool:
    """Whether this device has instructions for products in bfloat16."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in _CPU_INSTRUCTIONS)
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= _AMPERE
    return True


def product_dtype(config: LNGDConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a step's matrix products where the state has this one and lies there (`matrix_dtype`)."""
    if config.matrix_dtype == "auto" and not fast_bfloat16(device):
        return dtype
    return root_dtype(config, dtype)


def root_dtype(config: LNGDConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which roots and whiteners are kept for those products. Not a matter of the device: a checkpoint of
    one machine is another's, too."""
    return torch.bfloat16 if config.matrix_dtype != "full" and dtype == torch.float32 else dtype


def kept_dtype(config: LNGDConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of running matrices, and of their sums on the way between processes, where the state has this one."""
    return torch.bfloat16 if config.factor_dtype == "bfloat16" else dtype
