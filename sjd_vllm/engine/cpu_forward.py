"""A float32 model's forward on a CPU, made faster where vLLM 0.32 leaves time lying.

Products: PyTorch's instead of vLLM's own, which compiles a kernel for every new number of tokens and lets memory grow
with each. Windows make that number change from step to step; PyTorch's product takes any. It is faster by up to a third
for a few tokens where the weights lie in memory by input and not, as checkpoints have them, by output.

Normalisation: vLLM's C kernels, which its CPU build has and does not use. As ten small operators one of the demo model
takes 40 to 120 µs, however few tokens there are, and a step has nine; as a kernel it takes 6 to 30 µs. In float32 the
two agree to rounding; in other types, where the operators round twice and the kernels once, the operators stay.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from vllm import _custom_ops, ir
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationMode
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

_LOGGER = logging.getLogger("vllm.sjd_vllm")
_PROVIDER = "sjd_cpu"
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
_LANES = 16  # numbers that the kernels take at once; a row must be a multiple


def use_pytorchs_products() -> None:
    """Before the model is loaded; for all engines of the process."""
    _custom_ops._supports_onednn = False


def turn_weights(model: nn.Module) -> None:
    """Lay the weights of the products out by input; they are the same numbers under the same indices.

    Not those that are looked up as well as multiplied with (tied embeddings): a row of them must lie together.
    """
    modules = list(model.modules())
    looked_up = {
        id(module.weight)
        for module in modules
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    for module in modules:
        # vLLM sets `cpu_linear` where the product is of plain weights
        if isinstance(module, LinearBase | ParallelLMHead) and hasattr(module, "cpu_linear"):
            weight = module.weight
            if weight.ndim == 2 and weight.dtype == torch.float32 and id(weight) not in looked_up:
                weight.data = weight.data.t().contiguous().t()


def warn_of_saturation(model: nn.Module) -> None:
    """Say so where vLLM's products of eight-bit integers are wrong: on CPUs that add two of them in sixteen bits."""
    has_vnni = any(torch.cpu.get_capabilities().get(name) for name in _VNNI)
    kernels = (getattr(getattr(module, "scheme", None), "kernel", None) for module in model.modules())
    if not has_vnni and any(isinstance(kernel, CPUInt8ScaledMMLinearKernel) for kernel in kernels):
        _LOGGER.warning(
            "this CPU has no VNNI instructions; without them vLLM's int8 products cut off sums that do not fit 16 "
            "bits, and pictures may be wrong. Serve this checkpoint on a CPU that has them, or unquantised."
        )


def _is_supported(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    return (
        weight is not None
        and variance_size is None
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] % _LANES == 0
        and x.is_contiguous()
    )


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _is_supported(x, weight, variance_size)


def _takes_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _is_supported(x, weight, variance_size) and x_residual.is_contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def use_kernels_for_norms(vllm_config: VllmConfig) -> None:
    """Make this process's normalisations take the kernels, unless vLLM was told (`ir_op_priority`) what to take.

    A compiled model is left alone: there the operators are one with their neighbours.
    """
    current_platform.import_kernels()
    if vllm_config.compilation_config.mode not in (None, CompilationMode.NONE):
        return
    if not hasattr(torch.ops._C, "fused_add_rms_norm"):
        return
    for op, takes, kernel, inplace in (
        (ir.ops.rms_norm, _takes, _rms_norm, False),
        (ir.ops.fused_add_rms_norm, _takes_sum, _fused_add_rms_norm, True),
    ):
        if getattr(vllm_config.kernel_config.ir_op_priority, op.name) != ["native"]:
            continue
        if _PROVIDER not in op.impls:
            op.register_impl(_PROVIDER, supports_args=takes, inplace=inplace)(kernel)
        op.set_default([_PROVIDER, "native"])
