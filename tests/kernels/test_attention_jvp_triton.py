"""The Triton kernel of attention with tangents: interpreted (on a GPU: run there), and compiled for Hopper.

Each in a process of its own: Triton decides at its first import whether to interpret kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
CASES = Path(__file__).with_name("attention_jvp_triton_cases.py")


def environment(cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(cache)} | more


def test_the_cases(tmp_path):
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    env = environment(tmp_path, **interpreted)
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from workbench.kernels.attention_jvp_kernel import attention_jvp_kernel as kernel
constants = {"HAS_TQ": True, "HAS_TK": True, "HAS_TV": True, "CAUSAL": True, "FLOAT32": False}
constants |= {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_DV": 64}
types = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
types |= {"lse_ptr": "*fp32", "mean_ptr": "*fp32", "scale": "fp32"} | {name: "constexpr" for name in constants}
places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
built = compile(ASTSource(kernel, types, constexprs=places), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
print("tensor cores" if "wgmma" in built.asm["ptx"] else "none", built.metadata.shared)
"""


@pytest.mark.slow
def test_compiles_for_hopper_without_a_device(tmp_path):
    """Triton brings its own assembler: machine code with tensor cores, within the 227 KiB of shared memory."""
    script = tmp_path / "compile_kernel.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment(tmp_path), timeout=300
    )
    assert done.returncode == 0, done.stderr
    kind, shared_bytes = done.stdout.rsplit(maxsplit=1)
    assert kind == "tensor cores"
    assert int(shared_bytes) <= 232_448
