"""`linear_divergence`: chunked and Triton beside the reference, and what else it promises.

Triton decides at its first import whether to interpret kernels, so on a CPU the Triton cases run in a process of their
own (`TRITON_INTERPRET=1 pytest -k triton` on this file), which `test_triton_cases_under_the_interpreter` starts.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")
pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from largest_tensor import LargestTensor  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.kernels import divergences  # noqa: E402
from workbench.kernels.divergences import Divergence, DivergenceSpec, TopK  # noqa: E402
from workbench.kernels.linear_divergence import LinearLogits, linear_divergence  # noqa: E402

Tensor = torch.Tensor
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, WORDS = 5, 13
TERMS = [
    Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("jsd", 0.3), Divergence("total_variation"),
    Divergence("alpha", 0.4), Divergence("skew_forward_kl", 0.1), Divergence("skew_reverse_kl", 0.2),
    Divergence("cross_entropy"),
]  # fmt: skip
KL = (Divergence("forward_kl"),)
MIXTURE = (Divergence("forward_kl", weight=0.3), Divergence("reverse_kl", weight=0.7))
EVERYTHING = DivergenceSpec(terms=MIXTURE, temperature=2.0, standardise=True, interpolation=0.3, label_weight=0.5)
SPECS = {
    **{term.kind: DivergenceSpec(terms=(term,)) for term in TERMS},
    "all kinds": DivergenceSpec(terms=tuple(TERMS), temperature=0.7),
    "standardised": DivergenceSpec(terms=(TERMS[2],), standardise=True, temperature=2.0),
    "interpolated": DivergenceSpec(terms=(Divergence("cross_entropy"),), interpolation=0.4),
    "with labels": DivergenceSpec(terms=MIXTURE, label_weight=0.5, temperature=2.0),
    "labels only": DivergenceSpec(terms=(), label_weight=1.0),
    "everything": EVERYTHING,
}
TEACHERS = ("one", "two", "top-k", "top-k renormalised")
TOLERANCES = {"chunked": (torch.float64, 1e-11), "triton": (torch.float32, 2e-5)}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or DEVICE == "cuda"),
    reason="runs in a process of its own under Triton's interpreter",
)
IMPLEMENTATIONS = ["chunked", pytest.param("triton", marks=needs_triton)]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


class Case:
    """A student with leaves that want gradients, teachers of other widths, weights (one of them 0) and labels."""

    def __init__(
        self, tokens: int = TOKENS, words: int = WORDS, *, dtype=torch.float64, seed: int = 0, full=True
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(DEVICE, dtype)  # noqa: E731
        self.leaves = [x.requires_grad_() for x in (draw(tokens, 4), draw(words, 4), draw(words))]
        scale = torch.linspace(0.5, 1, tokens, dtype=dtype, device=DEVICE) if full else 1.0
        self.student = LinearLogits(*self.leaves, scale, 3.0 if full else None)
        one = LinearLogits(draw(tokens, 6), draw(words, 6), draw(words), 0.7, 5.0)
        two = LinearLogits(draw(tokens, 3), draw(words, 3), scale=scale)
        top = torch.log_softmax(one.logits(), -1).topk(min(5, words))
        ids = top.indices.clone()
        ids[0, -1] = -1
        self.teachers = {
            "one": one, "two": (one, two), "top-k": TopK(ids, top.values),
            "top-k renormalised": TopK(ids, top.values, renormalise=True),
        }  # fmt: skip
        self.weights = torch.rand(tokens, generator=random, dtype=torch.float64).to(DEVICE, dtype) + 0.1
        self.weights[tokens // 2] = 0
        self.labels = torch.randint(0, words, (tokens,), generator=random).to(DEVICE)
        self.labels[0] = -100

    def run(
        self, spec: DivergenceSpec, teacher: str = "one", implementation="reference", reduction="mean"
    ) -> list[Tensor]:
        """Loss, entropies and the gradients of a multiple of the loss."""
        weights = torch.tensor([1.0, 3.0], device=DEVICE) if teacher == "two" else None
        result = linear_divergence(
            self.student, self.teachers[teacher], spec, token_weights_T=self.weights, labels_T=self.labels,
            teacher_weights=weights, reduction=reduction, implementation=implementation, chunk_tokens=2,
        )  # fmt: skip
        loss = (
            result.loss if reduction != "none" else result.loss * torch.linspace(1, 2, len(result.loss), device=DEVICE)
        )
        grads = torch.autograd.grad(3 * loss.sum(), self.leaves)
        return [x.detach().double() for x in (*result, *grads)]


def compare(spec: DivergenceSpec, implementation: str, tokens: int = TOKENS, words: int = WORDS, **options) -> None:
    dtype, tolerance = TOLERANCES[implementation]
    seed, full = options.pop("seed", 0), options.pop("full", True)
    expected = Case(tokens, words, seed=seed, full=full).run(spec, **options)
    found = Case(tokens, words, dtype=dtype, seed=seed, full=full).run(spec, implementation=implementation, **options)
    for name, x, y in zip(("loss", "entropy", "target", "hidden", "head", "bias"), found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@each_implementation
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_equals_the_reference(implementation: str, name: str, teacher: str) -> None:
    if implementation == "triton" and teacher.startswith("top-k"):
        pytest.skip("top-k runs the same PyTorch code")
    compare(SPECS[name], implementation, teacher=teacher)


@each_implementation
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("full", [True, False])
def test_reductions(implementation: str, reduction: str, full: bool) -> None:
    compare(EVERYTHING, implementation, reduction=reduction, full=full)
    compare(SPECS["forward_kl"], implementation, reduction=reduction, full=full)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 7]), st.sampled_from([2, 3, 31]), st.integers(0, 99), st.sampled_from(list(SPECS)))
def test_any_shape(tokens: int, words: int, seed: int, name: str) -> None:
    for teacher in TEACHERS:
        compare(SPECS[name], "chunked", tokens, words, seed=seed, teacher=teacher)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="these are the cases")
def test_triton_cases_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "triton",
        __file__,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 40


@needs_triton
def test_triton_over_several_blocks_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.kernels import linear_divergence_triton as module

    monkeypatch.setattr(module, "MAX_BLOCK", 8)
    for name in ("all kinds", "everything", "forward_kl"):
        compare(SPECS[name], "triton", 3, 29)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(teacher: str, reduction: str) -> None:
    case = Case(3, 7)
    spec = DivergenceSpec(terms=tuple(TERMS[:3]), temperature=1.5, label_weight=0.5)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        student = LinearLogits(hidden, head, bias, case.student.scale, case.student.softcap)
        options = {"token_weights_T": case.weights, "labels_T": case.labels, "reduction": reduction, "chunk_tokens": 2}
        return linear_divergence(student, case.teachers[teacher], spec, implementation="chunked", **options).loss

    # The second backward pass computes what the first took from the forward pass, in another order.
    assert torch.autograd.gradcheck(loss, case.leaves, nondet_tol=1e-12)


@each_implementation
@pytest.mark.parametrize("term", TERMS, ids=lambda t: t.kind)
def test_extremes_and_masks(implementation: str, term: Divergence) -> None:
    """Logits of ±1e4, words masked on both sides, on the student's and on the teacher's only; a masked label."""
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE)
    head = torch.tensor([[1.0], [0.5], [-1.0], [0.0]], device=DEVICE)
    none = torch.zeros(4, device=DEVICE)
    masks = [none.index_fill(0, torch.tensor(words, device=DEVICE).long(), -math.inf) for words in ([], [3], [1, 3])]
    spec = DivergenceSpec(terms=(term,), label_weight=1.0)
    labels = torch.tensor([0, 3, -100], device=DEVICE)
    for student_bias, teacher_bias in ((masks[0], masks[0]), (masks[1], masks[1]), (masks[2], none), (none, masks[2])):
        found = []
        for chosen in ("reference", implementation):
            leaves = [x.clone().requires_grad_() for x in (hidden, head, student_bias)]
            teacher = LinearLogits(-hidden, head, teacher_bias)
            result = linear_divergence(
                LinearLogits(*leaves), teacher, spec, labels_T=labels, reduction="none", implementation=chosen
            )
            found.append([result.loss.detach(), *torch.autograd.grad(result.loss.sum(), leaves)])
        for x, y in zip(*found, strict=True):
            assert not x.isnan().any()
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        assert all(x.isfinite().all() for x in found[1][1:])


@each_implementation
def test_tokens_of_weight_zero_are_deleted_whatever_they_hold(implementation: str) -> None:
    case = Case(dtype=torch.float32, full=False)
    with torch.no_grad():
        case.leaves[0][TOKENS // 2] = math.nan
    found = case.run(SPECS["with labels"], implementation=implementation)
    assert all(x.isfinite().all() for x in found)
    assert (found[3][TOKENS // 2] == 0).all()
    case.weights.zero_()
    assert all((x == 0).all() for x in case.run(SPECS["with labels"], implementation=implementation))


def test_equals_trl_and_torch() -> None:
    trl = pytest.importorskip("trl.kernels.chunked_divergence", reason="the train extra is not installed")
    for beta in (0.0, 0.4, 1.0):
        case = Case(dtype=torch.float32)
        teacher = case.teachers["one"]
        student = LinearLogits(*case.leaves, 0.8, 3.0)
        spec = DivergenceSpec(terms=(Divergence("jsd", beta),), temperature=1.3)
        ours = linear_divergence(student, teacher, spec, reduction="none", implementation="chunked")
        theirs, entropy = trl.ChunkedDivergenceFunction.apply(
            *case.leaves, teacher.hidden_TH, teacher.head_VH, teacher.bias_V, beta, 1.3, 0.8, 3.0, 0.7, 5.0
        )
        torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.student_entropy_T, entropy, rtol=1e-5, atol=1e-6)
        weights = torch.linspace(1, 2, TOKENS)
        pairs = [torch.autograd.grad((x * weights).sum(), case.leaves) for x in (ours.loss, theirs)]
        for x, y in zip(*pairs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands(dtype: torch.dtype) -> None:
    """The same numbers as float32 arithmetic on the rounded inputs, up to the rounding of the gradients."""
    half, wide = Case(dtype=dtype, full=False), Case(dtype=torch.float32, full=False)
    with torch.no_grad():
        for x, y in zip(half.leaves, wide.leaves, strict=True):
            y.copy_(x)
    teacher = half.teachers["one"]
    wide.teachers["one"] = LinearLogits(
        teacher.hidden_TH.float(), teacher.head_VH.float(), teacher.bias_V.float(), teacher.scale, teacher.softcap
    )
    wide.weights = half.weights.float()
    for x, y in zip(half.run(SPECS["jsd"], implementation="chunked"), wide.run(SPECS["jsd"]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)
    assert linear_divergence(half.student, teacher, "reverse_kl").loss.dtype == torch.float32


def test_frozen_and_tied_heads_and_the_teacher() -> None:
    case = Case(full=False)
    hidden, head, _ = case.leaves
    teacher = LinearLogits(hidden.detach().flip(0).clone().requires_grad_(), head)
    linear_divergence(LinearLogits(hidden, head.detach()), teacher, "forward_kl").loss.backward()
    assert head.grad is None
    assert teacher.hidden_TH.grad is None
    frozen = hidden.grad
    assert frozen is not None
    hidden.grad = None
    # Tied: the same parameter makes the hidden states and the logits, and is the teacher's head as well.
    ids = torch.arange(TOKENS)
    losses = {}
    for name in ("reference", "chunked"):
        result = linear_divergence(LinearLogits(head[ids] * 2, head), teacher, "forward_kl", implementation=name)
        losses[name] = torch.autograd.grad(result.loss, head)[0]
    torch.testing.assert_close(losses["chunked"], losses["reference"])
    assert losses["chunked"].abs().max() > 0


def test_backward_twice_and_second_derivatives() -> None:
    case = Case()
    loss = linear_divergence(case.student, case.teachers["one"], "reverse_kl", token_weights_T=case.weights).loss
    first = torch.autograd.grad(2 * loss, case.leaves, retain_graph=True)
    again = torch.autograd.grad(2 * loss, case.leaves, retain_graph=True)
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(InputError, match="second derivative"):
        torch.autograd.grad(loss, case.leaves[0], create_graph=True)


def test_nothing_is_computed_for_gradients_that_nobody_wants() -> None:
    case = Case()
    with torch.no_grad():
        result = linear_divergence(case.student, case.teachers["one"], Divergence("jsd", 0.5))
    assert not result.loss.requires_grad
    expected = divergences.divergence(case.student.logits(), case.teachers["one"].logits(), Divergence("jsd", 0.5))
    torch.testing.assert_close(result.loss, expected.mean().detach())


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_holds_tokens_times_vocabulary(teacher: str, reduction: str) -> None:
    tokens, words = 128, 1000
    case = Case(tokens, words, dtype=torch.float32)
    spec = DivergenceSpec(terms=tuple(TERMS[:4]), standardise=True, interpolation=0.5, label_weight=1.0)
    options = {"labels_T": case.labels, "token_weights_T": case.weights, "reduction": reduction, "chunk_tokens": 16}
    with LargestTensor() as seen:
        loss = linear_divergence(case.student, case.teachers[teacher], spec, implementation="chunked", **options).loss
        loss.sum().backward()
    assert 16 * words <= seen.elements <= 3 * 16 * words
    with LargestTensor() as seen:
        linear_divergence(case.student, case.teachers[teacher], spec, implementation="reference", **options)
    assert seen.elements >= (tokens - 1) * words  # the yardstick sees what it is to see


@pytest.mark.parametrize("term", TERMS, ids=lambda t: t.kind)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_few_steps_bring_the_student_nearer(term: Divergence, teacher: str) -> None:
    case = Case(dtype=torch.float32, full=False)
    losses = []
    for _ in range(30):
        loss = linear_divergence(case.student, case.teachers[teacher], term, implementation="chunked").loss
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for leaf in case.leaves:
                assert leaf.grad is not None
                assert leaf.grad.abs().max() > 0
                leaf -= 0.3 * leaf.grad
                leaf.grad = None
    assert losses[-1] < 0.8 * losses[0]


def test_forward_kl_covers_modes_and_reverse_kl_seeks_one() -> None:
    """Student: one bump of a fixed width at a learnt place; teacher: two bumps, the right one a little larger."""
    place = torch.linspace(-3, 3, 25)
    bump = lambda centre: (-2 * (place - centre) ** 2).exp()  # noqa: E731
    teacher = LinearLogits(torch.ones(1, 1), (0.45 * bump(-1.5) + 0.55 * bump(1.5) + 1e-6).log()[:, None])
    # logits = -2 place² + 4 centre · place: only the centre is learnt.
    head, bias = 4 * place[:, None], -2 * place**2
    found = {}
    for kind in ("forward_kl", "reverse_kl"):
        centre = torch.tensor([[0.4]], requires_grad=True)
        for _ in range(200):
            student = LinearLogits(centre, head, bias)
            (slope,) = torch.autograd.grad(linear_divergence(student, teacher, kind).loss, centre)
            centre = (centre - 0.05 * slope).detach().requires_grad_()
        found[kind] = centre.item()
    assert abs(found["forward_kl"] - 0.1 * 1.5) < 0.05  # the mean of the teacher
    assert abs(found["reverse_kl"] - 1.5) < 0.1  # one of its modes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": DivergenceSpec(terms=KL, label_weight=1.0)}, "no labels_T"),
        ({"teacher": None}, "there is none"),
        ({"teacher": LinearLogits(torch.zeros(TOKENS, 2), torch.zeros(WORDS + 1, 2))}, "vocabulary 13 ≠ teacher"),
        ({"teacher": LinearLogits(torch.zeros(TOKENS + 1, 2), torch.zeros(WORDS, 2))}, "6 tokens"),
        ({"token_weights_T": torch.ones(TOKENS, requires_grad=True)}, "multiply the losses yourself"),
        ({"token_weights_T": torch.ones(TOKENS + 1)}, "token_weights_T must be"),
        ({"teacher_weights": torch.ones(3)}, "teacher_weights must be"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "triton"}, "float64" if INTERPRETED else "needs a GPU"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict, message: str) -> None:
    if change.get("implementation") == "triton":
        pytest.importorskip("triton")
    case = Case()
    options = {"student": case.student, "teacher": case.teachers["one"], "spec": "forward_kl"} | change
    with pytest.raises(InputError, match=message):
        linear_divergence(**options)


def test_kernel_compiles_for_a_gpu_without_one(tmp_path: Path) -> None:
    """The interpreter accepts programs that the compiler refuses: both of the kernel's pass layouts, for sm_90."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("divergence_compile.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cubin") == 3
