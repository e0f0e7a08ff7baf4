"""Fused linear divergence beside naive, TRL, Liger and torch.compile: time, extra memory, equal loss and gradients.

    python benchmarks/bench_linear_divergence.py --write          # CPU: 2,048 tokens, hidden 512, two vocabularies
    python benchmarks/bench_linear_divergence.py --gpu --write    # one CUDA device, up to 32,768 × 151,936, bfloat16

Each implementation runs in a process of its own. Extra peak memory is the process's peak during the first call less
what it held before and less the gradients that every implementation must return. Before any figure is printed, loss and
gradients are compared with the first implementation that ran; one that differs or fails is a row without figures. On
the CPU: two threads that sleep while they wait, median of CPU seconds (the machine is shared) and of wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
CPU_SIZES = [(2048, 512, 32_000), (2048, 512, 151_936)]
GPU_SIZES = [(32_768, 4096, 151_936), (4096, 4096, 151_936), (4096, 4096, 32_000)]
CPU_IMPLEMENTATIONS = ["naive", "trl", "liger", "chunked"]
GPU_IMPLEMENTATIONS = ["chunked", "triton", "trl", "liger", "compiled", "naive"]
#: Relative differences of loss and gradients that still count as equal.
TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}
#: Dense bfloat16 operations and bytes a second, from the vendor's data sheets; the floor is stated for these.
GPU_PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.0e12)}


def make_loss(name: str, beta: float, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """The mean divergence of all tokens by one implementation, as a function without arguments."""
    import torch

    student_hidden, student_head, teacher_hidden, teacher_head = inputs
    if name in ("chunked", "triton"):
        from workbench.kernels.divergences import Divergence
        from workbench.kernels.linear_divergence import LinearLogits, linear_divergence

        return lambda: linear_divergence(
            LinearLogits(student_hidden, student_head), LinearLogits(teacher_hidden, teacher_head),
            Divergence("jsd", beta), implementation=name,
        ).loss  # fmt: skip
    if name == "trl":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        heads = (student_hidden, student_head, None, teacher_hidden, teacher_head, None)
        return lambda: ChunkedDivergenceFunction.apply(*heads, beta, 1.0, 1.0, None, 1.0, None)[0].mean()
    if name == "liger":
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction  # pyright: ignore

        labels = torch.zeros(len(student_hidden), dtype=torch.long, device=student_hidden.device)
        compiled = student_hidden.device.type == "cuda"
        operands = (student_hidden, student_head, teacher_hidden, teacher_head, labels, None, None)
        return lambda: LigerFusedLinearJSDFunction.apply(*operands, 0.0, 1.0, beta, -100, 1.0, compiled)
    loss = lambda: naive(student_hidden, student_head, teacher_hidden, teacher_head, beta)  # noqa: E731
    return torch.compile(loss) if name == "compiled" else loss


def naive(student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any, beta: float) -> Any:
    """What one writes without thinking of memory: both logits, log-softmax, torch's kl_div."""
    import torch
    from torch.nn import functional

    log_q = functional.log_softmax((student_hidden @ student_head.t()).float(), -1)
    with torch.no_grad():
        log_p = functional.log_softmax((teacher_hidden @ teacher_head.t()).float(), -1)
    if beta in (0.0, 1.0):
        pair = (log_q, log_p) if beta == 0.0 else (log_p, log_q)
        return functional.kl_div(*pair, reduction="batchmean", log_target=True)
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
    kl = [functional.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q)]
    return (kl[0] + kl[1]) / 2


def worker(name: str, kind: str, size: tuple[int, int, int], device: str, repeats: int) -> dict[str, Any]:
    """Measures one implementation in this process."""
    import torch

    torch.set_num_threads(2)
    tokens, width, words = size
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    random = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, device=device, dtype=dtype)  # noqa: E731
    hidden, head = draw(tokens, width).requires_grad_(), draw(words, width).mul_(width**-0.5).requires_grad_()
    inputs = (hidden, head, draw(tokens, width), draw(words, width).mul_(width**-0.5))
    loss_of = make_loss(name, NAMES[kind], inputs)
    torch.mm(inputs[2][:64], inputs[2][:64].t())  # the BLAS library's own buffers
    held = memory(device)
    times, cpu_times, fingerprint, peak = [], [], {}, 0
    for _ in range(repeats):
        hidden.grad = head.grad = None
        began, began_cpu = clock(device), time.process_time()
        loss = loss_of()
        loss.backward()
        times.append(clock(device) - began)
        cpu_times.append(time.process_time() - began_cpu)
        if not fingerprint:
            peak = memory(device, peak=True)
            assert hidden.grad is not None
            assert head.grad is not None
            rows = torch.arange(0, words, words // 50, device=device)
            fingerprint = {
                "loss": loss.item(),
                "hidden": float(hidden.grad.float().norm()),
                "head": float(head.grad.float().norm()),
                "hidden_rows": hidden.grad[:: tokens // 16, :8].flatten().tolist(),
                "head_rows": head.grad[rows, :8].flatten().tolist(),
            }  # fmt: skip
    # The first call warms up (allocator, compilation); it only counts where it is alone.
    return fingerprint | {
        "wall": statistics.median(times[1:] or times), "cpu": statistics.median(cpu_times[1:] or cpu_times),
        "extra": peak - held - sum(x.numel() * x.element_size() for x in (hidden, head)),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }  # fmt: skip


def clock(device: str) -> float:
    """Seconds, after the device has finished."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str, *, peak: bool = False) -> int:
    """Bytes held now, or at most so far."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_worker(
    name: str, kind: str, size: tuple[int, int, int], device: str, repeats: int, limit: float
) -> dict[str, Any]:
    """One implementation in a process of its own; its last line is its result."""
    command = [sys.executable, __file__, "--worker", name, kind, *map(str, size), device, str(repeats)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:100]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def differs(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> str | None:
    """What is not equal, if anything: loss, norms, or sampled entries of the gradients (relative to their largest)."""
    for key in ("loss", "hidden", "head"):
        if not abs(found[key] - expected[key]) <= tolerance * abs(expected[key]):
            return f"{key} {found[key]:.6g} instead of {expected[key]:.6g}"
    for key in ("hidden_rows", "head_rows"):
        largest = max(map(abs, expected[key]))
        if not max(abs(x - y) for x, y in zip(found[key], expected[key], strict=True)) <= tolerance * largest:
            return f"{key} of the gradient"
    return None


def floor(size: tuple[int, int, int], device_name: str) -> str:
    """Operations of the four matrix products, bytes that must move at least, and on a known GPU the time they take."""
    tokens, width, words = size
    operations = 8 * tokens * width * words
    # Logits of both sides written by a product and read by the divergence (float32), the gradient written in 16 bits
    # and read by two products; heads and the head's gradient once.
    moved = tokens * words * (2 * 4 + 2 * 4 + 2 + 2 * 2) + words * width * (2 * 2 + 2 * 2)
    text = f"{operations / 1e12:.2f} Tflop, {moved / 1e9:.1f} GB"
    for name, (flops, bandwidth) in GPU_PEAKS.items():
        if name in device_name:
            text += f"; floor on {name} {1e3 * operations / flops:.1f} ms + {1e3 * moved / bandwidth:.1f} ms"
    return text


def table(options: argparse.Namespace) -> list[str]:
    """Measures everything and returns the tables' lines, printing them as they come."""
    device = "cuda" if options.gpu else "cpu"
    sizes = GPU_SIZES if options.gpu else CPU_SIZES
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    deadline = time.monotonic() + options.minutes * 60
    for size in sizes if options.vocabulary is None else [s for s in sizes if s[2] == options.vocabulary]:
        for kind in options.kinds:
            results: dict[str, dict[str, Any]] = {}
            for name in options.implementations or (GPU_IMPLEMENTATIONS if options.gpu else CPU_IMPLEMENTATIONS):
                left = deadline - time.monotonic()
                results[name] = (
                    run_worker(name, kind, size, device, options.repeats, left)
                    if left > 5
                    else {"error": "no time left"}
                )
            good = [r for r in results.values() if "error" not in r]
            say(f"\n{kind}, {size[0]:,} tokens, hidden {size[1]}, vocabulary {size[2]:,}"
                f" ({floor(size, good[0]['device'] if good else '')})\n")  # fmt: skip
            say("| implementation | CPU s | wall s | extra peak MB | time / TRL | memory / naive | memory / TRL |")
            say("|---|---|---|---|---|---|---|")
            for name, result in results.items():
                problem = result.get("error") or differs(result, good[0], TOLERANCE[device])
                say(f"| {name} | {problem} | | | | | |" if problem else row(name, result, results, device))
    return lines


def row(name: str, result: dict[str, Any], results: dict[str, dict[str, Any]], device: str) -> str:
    """A line of the table."""
    timed = "cpu" if device == "cpu" else "wall"

    def ratio(other: str, key: str) -> str:
        base = results.get(other, {}).get(key)
        return f"{result[key] / base:.2f}" if base else "–"

    cpu = f"{result['cpu']:.2f}" if device == "cpu" else "–"
    shares = f"{ratio('trl', timed)} | {ratio('naive', 'extra')} | {ratio('trl', 'extra')}"
    return f"| {name} | {cpu} | {result['wall']:.4g} | {result['extra'] / 1e6:,.0f} | {shares} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="measure on the CUDA device instead of the CPU")
    parser.add_argument("--kinds", nargs="+", choices=NAMES, help="default: all; with --gpu forward_kl and jsd")
    parser.add_argument("--vocabulary", type=int, help="only the sizes with this vocabulary")
    parser.add_argument("--implementations", nargs="+", choices=sorted({*CPU_IMPLEMENTATIONS, *GPU_IMPLEMENTATIONS}))
    parser.add_argument("--repeats", type=int, default=4, help="calls in each process; the first warms up")
    parser.add_argument("--minutes", type=float, default=None, help="stop measuring after this long (GPU: 9.5)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/linear_divergence[_gpu].md")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, kind, *size, device, repeats = options.worker
        print(json.dumps(worker(name, kind, (int(size[0]), int(size[1]), int(size[2])), device, int(repeats))))
        return
    if options.gpu:
        import torch

        if not torch.cuda.is_available():
            parser.error("--gpu needs a CUDA device and a torch that is built for it; there is none")
    options.kinds = options.kinds or (["forward_kl", "jsd"] if options.gpu else list(NAMES))
    options.minutes = options.minutes or (9.5 if options.gpu else 600)
    load = os.getloadavg()[0]
    lines = table(options)
    if options.write:
        command = "python benchmarks/bench_linear_divergence.py " + " ".join(sys.argv[1:])
        target = ROOT / "benchmarks/results" / f"linear_divergence{'_gpu' if options.gpu else ''}.md"
        target.write_text(
            "# Divergence between two linear heads\n\n"
            f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, load at "
            f"the beginning {load:.1f}, Python {platform.python_version()}; `{command}`. Median of "
            f"{options.repeats - 1} calls after one to warm up, each implementation in a process of its own, loss and "
            "gradients compared first. Extra "
            "memory: peak less inputs and returned gradients.\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
