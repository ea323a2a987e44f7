"""What the CPU is, and how many bytes things take."""

from __future__ import annotations

import functools

import llvmlite.binding as llvm
import torch

FLOAT_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # of a channel, where a token is a row of numbers


@functools.cache
def host() -> tuple[int, int]:
    """`(lanes, accumulators)`: float32 lanes of the host's vectors, and how many of them a register block may take."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 16
    if features.get("avx2"):
        return 8, 8
    return 4, 16 if features.get("neon") else 8


@functools.cache
def host_is_supported() -> bool:
    """Whether the compiled code can convert float16 here; only x86 CPUs from before 2012 cannot."""
    x86 = llvm.get_process_triple().startswith(("x86", "i386", "i686"))
    return not x86 or bool(llvm.get_host_cpu_features().get("f16c"))


def row_bytes(form: int | str, head_dim: int) -> int:
    """Bytes of one token of one head in a format."""
    return head_dim * form // 8 if isinstance(form, int) else head_dim * ITEM_BYTES[form]
