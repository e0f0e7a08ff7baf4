"""Compiles the divergence kernel for an sm_90 GPU; run in a process of its own, without Triton's interpreter."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workbench.kernels import linear_divergence_triton

BASE = {
    "FINAL": False, "SOFTCAP": False, "TARGET_SOFTCAP": False, "STANDARDISE": False, "INTERPOLATE": False,
    "LABELS": False, "GRADIENT": True, "ONE_PASS": False, "BLOCK": 1024,
}  # fmt: skip


def argument_type(name: str) -> str:
    """The type that the launcher gives an argument of this name."""
    if name.isupper():
        return "constexpr"
    if name.endswith("_ptr"):
        return "*i64" if name == "labels_ptr" else "*fp32"
    return "i32" if name.startswith("num_") else "fp32"


def main() -> None:
    kernel = linear_divergence_triton._rows_kernel
    everything = {"STANDARDISE": True, "INTERPOLATE": True, "LABELS": True, "SOFTCAP": True, "TARGET_SOFTCAP": True}
    for flags in ({"TERMS": 1, "ONE_PASS": True}, {"TERMS": 2, "GRADIENT": False}, {"TERMS": 255, **everything}):
        signature = {name: argument_type(name) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=BASE | flags)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        print("cubin", len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
