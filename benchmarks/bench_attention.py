"""Attention: forward-mode derivative, long patterns and the cost of choosing a path, beside PyTorch's own ways.

    python benchmarks/bench_attention.py [--write]          # CPU, one thread, some minutes
    python benchmarks/bench_attention.py --gpu [--write]    # one CUDA device, under ten minutes

CPU: every figure comes from a process of its own: CPU seconds, minimum of the repeats, and the peak of resident memory
above what inputs and imports hold. Outputs and gradients of all providers are compared before anything is timed.
`--write` puts the tables into benchmarks/results/attention.md or attention_gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.kernels.attention import attention
from workbench.kernels.attention_reference import reference_attention

RESULTS = Path(__file__).parent / "results"
HEADS, WIDTH = 4, 64
WINDOW, SEQUENCES = 256, 16
Call = Callable[..., torch.Tensor]


def inputs(length: int, heads: int = HEADS, width: int = WIDTH, device: str = "cpu", dtype=torch.float32):
    """q, k, v and their tangents, [1, heads, length, width]."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, width, generator=g).to(device, dtype) for _ in range(6)]


def math_path(q, k, v, *, causal: bool):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def jvp_step(call: Call, tensors, causal: bool, mode: str) -> list[torch.Tensor]:
    """Output and tangent; with gradients of q, k, v through the output ("train") or through both ("train both")."""
    primals = [x.detach().requires_grad_(mode != "forward") for x in tensors[:3]]
    found = torch.func.jvp(lambda *x: call(*x, causal=causal), tuple(primals), tuple(tensors[3:]))
    out, tangent = found[:2]
    if mode == "forward":
        return [out, tangent]
    loss = (out * tangent.detach()).sum() if mode == "train" else (out * tangent).sum()
    return [out, tangent, *torch.autograd.grad(loss, primals)]


def plain_step(call: Call, tensors, train: bool) -> list[torch.Tensor]:
    primals = [x.detach().requires_grad_(train) for x in tensors[:3]]
    out = call(*primals)
    return [out, *torch.autograd.grad(out.square().sum(), primals)] if train else [out]


def pattern_mask(pattern: str, length: int) -> torch.Tensor:
    at = torch.arange(length)
    seen = at[:, None] >= at
    if pattern == "window":
        return seen & (at[:, None] - at < WINDOW)
    rows = at // (length // SEQUENCES)
    return seen & (rows[:, None] == rows) if pattern == "packed" else seen


def pattern_call(pattern: str, provider: str, length: int) -> Call:
    """Masked attention by our dispatch, and as models do it without: a dense mask for SDPA, or eager soft-capping."""
    if provider == "ours":
        starts = torch.arange(0, length + 1, length // SEQUENCES, dtype=torch.int32)
        options: dict[str, dict[str, Any]] = {
            "window": {"window": WINDOW},
            "packed": {"cu_seqlens_q": starts},
            "softcap": {"softcap": 30.0},
        }
        return lambda q, k, v: attention(q, k, v, causal=True, **options[pattern])
    # Made here, outside of what is measured; ours has no mask.
    mask = pattern_mask(pattern, length)
    if pattern == "softcap":
        return lambda q, k, v: reference_attention(q, k, v, visible=mask, softcap=30.0)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def step_of(kind: str, provider: str, mode: str, length: int) -> Callable[[], list[torch.Tensor]]:
    tensors = inputs(length)
    if kind == "jvp":
        call = attention if provider == "ours" else math_path
        return lambda: jvp_step(call, tensors, False, mode)
    if kind == "jvp causal":
        call = attention if provider == "ours" else math_path
        return lambda: jvp_step(call, tensors, True, mode)
    if kind == "flash forward":
        return lambda: plain_step(F.scaled_dot_product_attention, tensors, False)
    pattern = pattern_call(kind, provider, length)
    return lambda: plain_step(pattern, tensors, mode == "train")


def memory_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_one(kind: str, provider: str, mode: str, length: int, repeats: int) -> dict[str, float]:
    """CPU seconds and extra peak MB of one step, in this process."""
    torch.set_num_threads(1)
    step_of(kind, provider, mode, 128)()
    step = step_of(kind, provider, mode, length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory_kib("VmRSS")
    step()
    peak = memory_kib("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"cpu_s": min(seconds), "extra_mb": peak / 1024}


def measure(kind: str, provider: str, mode: str, length: int, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", kind, provider, mode, str(length), str(repeats)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal() -> None:
    for kind in ("jvp", "jvp causal"):
        ours, peer = (step_of(kind, p, "train both", 512)() for p in ("ours", "math"))
        for a, b in zip(ours, peer, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for kind in ("window", "packed", "softcap"):
        ours, peer = (step_of(kind, p, "train", 1024)() for p in ("ours", "peer"))
        for a, b in zip(ours, peer, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def overhead_rows() -> list[str]:
    """Microseconds of CPU per call beside PyTorch's function, on calls that compute next to nothing."""
    rows = ["| call | SDPA, µs | attention(), µs | added |", "|---|---|---|---|"]
    torch.set_num_threads(1)
    q, k, v, *_ = inputs(128)
    seen = torch.ones(1, 1, 1, 128, dtype=torch.bool)
    one = q[:, :, :1]
    calls: dict[str, tuple[Callable, Callable]] = {
        "decode: 1 query, 128 keys": (
            lambda: F.scaled_dot_product_attention(one, k, v),
            lambda: attention(one, k, v, causal=True),
        ),
        "decode with a mask": (
            lambda: F.scaled_dot_product_attention(one, k, v, attn_mask=seen),
            lambda: attention(one, k, v, mask=seen),
        ),
        "causal, 128 tokens": (
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda: attention(q, k, v, causal=True),
        ),
    }
    with torch.no_grad():
        for name, pair in calls.items():
            times = [min(timed(call, 1000) for _ in range(15)) for call in pair]
            rows.append(f"| {name} | {times[0]:.1f} | {times[1]:.1f} | {times[1] - times[0]:.1f} |")
    return rows


def timed(call: Callable, times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times * 1e6


def cpu_tables() -> str:
    assert_equal()
    text = ["## Forward-mode derivative, float32, 4 heads of width 64, one thread", ""]
    text += [
        "| | length | step | ours, s | math path, s | ratio | ours, MB | math path, MB | ratio | flash forward x |"
    ]
    text += ["|---|---|---|---|---|---|---|---|---|---|"]
    for length, repeats in ((1024, 7), (4096, 3)):
        flash = measure("flash forward", "peer", "forward", length, repeats)["cpu_s"]
        for kind in ("jvp", "jvp causal"):
            for mode in ("forward", "train", "train both"):
                ours, peer = (measure(kind, p, mode, length, repeats) for p in ("ours", "math"))
                t, m = ours["cpu_s"], ours["extra_mb"]
                text.append(
                    f"| {'causal' if 'causal' in kind else 'full'} | {length} | {mode} | {t:.3f} | {peer['cpu_s']:.3f} "
                    f"| {t / peer['cpu_s']:.2f} | {m:.0f} | {peer['extra_mb']:.0f} | {m / peer['extra_mb']:.2f} "
                    f"| {t / flash:.1f} |"
                )
    text += ["", f"## Patterns at 4,096 tokens (window {WINDOW}; {SEQUENCES} packed sequences; soft-capping)", ""]
    text += ["| pattern | step | ours, s | peer, s | ratio | ours, MB | peer, MB |", "|---|---|---|---|---|---|---|"]
    for kind in ("window", "packed", "softcap"):
        for mode in ("forward", "train"):
            ours, peer = (measure(kind, p, mode, 4096, 3) for p in ("ours", "peer"))
            text.append(
                f"| {kind} | {mode} | {ours['cpu_s']:.3f} | {peer['cpu_s']:.3f} | {ours['cpu_s'] / peer['cpu_s']:.2f} "
                f"| {ours['extra_mb']:.0f} | {peer['extra_mb']:.0f} |"
            )
    return "\n".join([*text, "", "## Cost of choosing a path", "", *overhead_rows()])


def gpu_seconds(call: Callable, budget_seconds: float = 2.0) -> float:
    """Median of at most 50 repeats by CUDA events, after warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    taken: list[float] = []
    end_by = time.monotonic() + budget_seconds
    while len(taken) < 5 or (len(taken) < 50 and time.monotonic() < end_by):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return sorted(taken)[len(taken) // 2]


def gpu_peak_mb(call: Callable) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def attained() -> tuple[float, float]:
    """What this device attains: operations a second (bfloat16 product of 8,192 cubed) and bytes a second (copy)."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    operations = 2 * 8192**3 / gpu_seconds(lambda: a @ a)
    x = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return operations, 2 * x.nbytes / gpu_seconds(lambda: y.copy_(x))


def assert_equal_on_gpu(width: int, causal: bool) -> None:
    tensors = inputs(1024, 2, width, "cuda", torch.bfloat16)
    ours = jvp_step(attention, tensors, causal, "train")
    exact = jvp_step(math_path, [x.double() for x in tensors], causal, "train")
    for a, b in zip(ours, exact, strict=True):
        error = float(((a.double() - b).norm() / b.norm()).detach())
        assert error < 0.02, f"relative error {error}"


def gpu_tables() -> str:
    operations, bandwidth = attained()
    heads = 16
    text = [
        f"{operations / 1e12:.0f} TFLOP/s (bfloat16 product) and {bandwidth / 1e12:.2f} TB/s (copy) attained here.",
        "",
    ]
    text += [
        "| width | | length | floor, ms | ours, ms | x floor | 2 x flash, ms | math path, ms | ours, MB | math, MB |"
    ]
    text += ["|---|---|---|---|---|---|---|---|---|---|"]
    for width in (64, 128):
        for causal in (False, True):
            assert_equal_on_gpu(width, causal)
            for length in (1024, 4096, 16384):
                text.append(gpu_row(heads, width, causal, length, operations, bandwidth))
    text += ["", "Train: with the backward pass through the output (PyTorch tiles), width 64, full:", ""]
    for length in (1024, 4096, 16384):
        tensors = inputs(length, heads, 64, "cuda", torch.bfloat16)
        seconds = gpu_seconds(lambda t=tensors: jvp_step(attention, t, False, "train"))
        text.append(f"- {length}: {1e3 * seconds:.2f} ms")
    return "\n".join(text)


def gpu_row(heads: int, width: int, causal: bool, length: int, operations: float, bandwidth: float) -> str:
    """Floor: six products of 2 L^2 D operations a head (causal: half), or eight tensors read or written once."""
    tensors = inputs(length, heads, width, "cuda", torch.bfloat16)
    work = 12 * heads * length * length * width / (2 if causal else 1)
    floor = max(work / operations, 8 * tensors[0].nbytes / bandwidth)
    step = lambda: jvp_step(attention, tensors, causal, "forward")  # noqa: E731
    ours, peak = gpu_seconds(step), gpu_peak_mb(step)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = tensors[:3]
        flash = gpu_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    if length <= 4096:  # 16,384 would need a dozen matrices of 8 GiB
        peer = lambda: jvp_step(math_path, tensors, causal, "forward")  # noqa: E731
        math_ms, math_mb = f"{1e3 * gpu_seconds(peer):.2f}", f"{gpu_peak_mb(peer):.0f}"
    else:
        math_ms = math_mb = "-"
    return (
        f"| {width} | {'causal' if causal else 'full'} | {length} | {1e3 * floor:.3f} | {1e3 * ours:.3f} "
        f"| {ours / floor:.1f} | {2e3 * flash:.3f} | {math_ms} | {peak:.0f} | {math_mb} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/attention.md (attention_gpu.md)")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, provider, mode, length, repeats = options.one
        print(json.dumps(measure_one(kind, provider, mode, int(length), int(repeats))))
        return
    machine = torch.cuda.get_device_name() if options.gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    tables = gpu_tables() if options.gpu else cpu_tables()
    print(tables)
    if options.write:
        name = "attention_gpu.md" if options.gpu else "attention.md"
        flag = " --gpu" if options.gpu else ""
        (RESULTS / name).write_text(
            f"# Attention\n\n{datetime.now(UTC):%Y-%m-%d}, {platform.system()}, {machine}, torch {torch.__version__}, "
            f"Python {platform.python_version()}; `python benchmarks/bench_attention.py{flag} --write`\n\n{tables}\n"
        )


if __name__ == "__main__":
    main()
