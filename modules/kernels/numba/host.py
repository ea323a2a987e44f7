"""What the CPU is, and how many bytes things take."""

from __future__ import annotations

import functools

import llvmlite.binding as llvm
import torch
from numba.core import config

FLOAT_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # of a channel, where a token is a row of numbers


@functools.cache
def _features() -> dict[str, bool]:
    """Of the CPU that Numba compiles for: the host's, unless NUMBA_CPU_FEATURES says otherwise."""
    if config.CPU_FEATURES is None:
        return dict(llvm.get_host_cpu_features())
    return {feature[1:]: feature[0] == "+" for feature in config.CPU_FEATURES.split(",") if feature}


def host_has(feature: str) -> bool:
    """Whether the CPU has a feature, as LLVM names it."""
    return bool(_features().get(feature))


@functools.cache
def byte_products() -> str:
    """How four products of bytes are added to 32 bits: "vnni" at once, "pairs" through sums of two in 16 bits, which must
    not exceed them; "" where there is no such instruction."""
    if all(map(host_has, ("avx512vnni", "avx512bw", "avx512vl"))) or host_has("avxvnni") and not host_has("avx512f"):
        return "vnni"
    return "pairs" if host_has("avx512bw" if host_has("avx512f") else "avx2") else ""


@functools.cache
def host() -> tuple[int, int]:
    """`(lanes, accumulators)`: float32 lanes of the host's vectors, and how many of them a register block may take."""
    if host_has("avx512f"):
        return 16, 16
    if host_has("avx2"):
        return 8, 8
    return 4, 16 if host_has("neon") else 8


@functools.cache
def host_is_supported() -> bool:
    """Whether the compiled code can convert float16 here; only x86 CPUs from before 2012 cannot."""
    x86 = llvm.get_process_triple().startswith(("x86", "i386", "i686"))
    return not x86 or host_has("f16c")


def row_bytes(form: int | str, head_dim: int) -> int:
    """Bytes of one token of one head in a format."""
    return head_dim * form // 8 if isinstance(form, int) else head_dim * ITEM_BYTES[form]
