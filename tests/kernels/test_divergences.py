"""The reference divergences: closed forms, other libraries, limits, extremes, masks, and the cards' identities."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.kernels import divergences as d  # noqa: E402
from workbench.kernels.divergences import Divergence, DivergenceSpec, TopK  # noqa: E402

Tensor = torch.Tensor
DOUBLE = torch.float64
TERMS = [
    Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("jsd", 0.3), Divergence("total_variation"),
    Divergence("alpha", 0.4), Divergence("skew_forward_kl", 0.1), Divergence("skew_reverse_kl", 0.2),
]  # fmt: skip
each_term = pytest.mark.parametrize("term", TERMS, ids=lambda t: t.kind)


def logits(seed: int, tokens: int = 5, words: int = 11, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(tokens, words, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    variable = at.clone().requires_grad_()
    return torch.autograd.grad(function(variable).sum(), variable)[0]


def test_closed_forms_on_three_words() -> None:
    q, p = [0.2, 0.3, 0.5], [0.5, 0.4, 0.1]
    pairs = list(zip(q, p, strict=True))
    student, teacher = torch.tensor([q], dtype=DOUBLE).log() + 3, torch.tensor([p], dtype=DOUBLE).log() - 7
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    mixture = [0.3 * y + 0.7 * x for x, y in pairs]
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.3 * kl(p, mixture) + 0.7 * kl(q, mixture),
        "total_variation": 0.5 * (0.3 + 0.1 + 0.4),
        "alpha": (1 - sum(y**0.4 * x**0.6 for x, y in pairs)) / 0.24,
        "skew_forward_kl": kl(p, [0.1 * y + 0.9 * x for x, y in pairs]),
        "skew_reverse_kl": kl(q, [0.2 * x + 0.8 * y for x, y in pairs]),
    }
    for term in TERMS:
        assert d.divergence(student, teacher, term).item() == pytest.approx(expected[term.kind], rel=1e-12), term
    cross = -sum(y * math.log(x) for x, y in pairs)
    assert d.cross_entropy(student, teacher).item() == pytest.approx(cross, rel=1e-12)
    assert d.label_cross_entropy(student, torch.tensor([1])).item() == pytest.approx(-math.log(0.3), rel=1e-12)


def test_kl_and_entropy_equal_torch_distributions() -> None:
    student, teacher = logits(0), logits(1)
    q, p = (torch.distributions.Categorical(logits=z) for z in (student, teacher))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(d.forward_kl(student, teacher), kl(p, q))
    torch.testing.assert_close(d.reverse_kl(student, teacher), kl(q, p))
    torch.testing.assert_close(d.entropy(student), q.entropy())


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_equals_trl(beta: float) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl.experimental warns that it is experimental
        from trl.experimental.gold.gold_trainer import GOLDTrainer
    student, teacher = logits(0), logits(1)
    theirs = GOLDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, temperature=1.7, reduction="sum")
    ours = d.divergence(student, teacher, DivergenceSpec(terms=(Divergence("jsd", beta),), temperature=1.7))
    torch.testing.assert_close(ours.sum(), theirs)


@each_term
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.1, 8))
def test_is_zero_at_equality_positive_elsewhere_and_blind_to_shifts(
    term: Divergence, seed: int, words: int, spread: float
) -> None:
    student, teacher = logits(seed, 3, words, spread), logits(seed + 1, 3, words, spread)
    value = d.divergence(student, teacher, term)
    assert (value > 0).all()
    shift = torch.tensor([[3.0], [-50.0], [1e3]], dtype=DOUBLE)
    torch.testing.assert_close(d.divergence(student + shift, teacher - shift, term), value, rtol=1e-8, atol=1e-10)
    order = torch.randperm(words, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(d.divergence(student[:, order], teacher[:, order], term), value)
    equal = d.divergence(teacher + shift, teacher, term)
    torch.testing.assert_close(equal, torch.zeros_like(equal), atol=1e-9, rtol=0)
    if term.kind != "total_variation":  # it has a kink there
        assert gradient(lambda z: d.divergence(z, teacher, term), teacher).abs().max() < 1e-9


@each_term
def test_gradient_equals_finite_differences(term: Divergence) -> None:
    teacher = logits(1)
    assert torch.autograd.gradcheck(lambda z: d.divergence(z, teacher, term), logits(0).requires_grad_())


def test_stated_gradients() -> None:
    student, teacher = logits(0), logits(1)
    q, p = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(gradient(lambda z: d.forward_kl(z, teacher), student), q - p)
    kl = d.reverse_kl(student, teacher)[:, None]
    torch.testing.assert_close(gradient(lambda z: d.reverse_kl(z, teacher), student), q * ((q / p).log() - kl))
    sign = (q - p).sign()
    stated = 0.5 * q * (sign - (q * sign).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(lambda z: d.total_variation(z, teacher), student), stated)


def test_limits_of_the_families() -> None:
    student, teacher = logits(0, spread=1), logits(1, spread=1)
    forward, reverse = d.forward_kl(student, teacher), d.reverse_kl(student, teacher)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(d.jsd(student, teacher, 1e-6) / 1e-6, forward, **close)
    torch.testing.assert_close(d.jsd(student, teacher, 1 - 1e-6) / 1e-6, reverse, **close)
    torch.testing.assert_close(d.jsd(student, teacher, 0), forward)
    torch.testing.assert_close(d.jsd(student, teacher, 1), reverse)
    torch.testing.assert_close(d.jsd(student, teacher, 0.5), d.jsd(teacher, student, 0.5))
    assert d.jsd(40 * student, 40 * teacher, 0.5).max() <= math.log(2) + 1e-12
    torch.testing.assert_close(d.alpha_divergence(student, teacher, 1 - 1e-6), forward, **close)
    torch.testing.assert_close(d.alpha_divergence(student, teacher, 1e-6), reverse, **close)
    hellinger = 4 * (1 - (student.softmax(-1) * teacher.softmax(-1)).sqrt().sum(-1))
    torch.testing.assert_close(d.alpha_divergence(student, teacher, 0.5), hellinger)
    for skewed, plain in ((d.skew_forward_kl, forward), (d.skew_reverse_kl, reverse)):
        torch.testing.assert_close(skewed(student, teacher, 1e-7), plain, **close)
        torch.testing.assert_close(skewed(student, teacher, 0.0), plain)
    spec = DivergenceSpec(terms=(Divergence("forward_kl", weight=0.2), Divergence("reverse_kl", weight=3.0)))
    torch.testing.assert_close(d.divergence(student, teacher, spec), 0.2 * forward + 3 * reverse)
    torch.testing.assert_close(d.cross_entropy(student, teacher), forward + d.entropy(teacher))
    # Hot softmax: T² KL tends to half the variance of the logits' difference (Hinton et al. 2015, sec. 2.1).
    hot = d.divergence(student, teacher, DivergenceSpec(terms=(Divergence("forward_kl"),), temperature=1e4)) * 1e8
    torch.testing.assert_close(hot, 0.5 * (student - teacher).var(-1, correction=0), rtol=1e-3, atol=0)


def test_extreme_logits_have_their_limits_and_no_nan() -> None:
    student = torch.tensor([[1e4, 0.0, -1e4]])
    teacher = torch.tensor([[-1e4, 0.0, 1e4]])
    expected = {
        "forward_kl": 2e4, "reverse_kl": 2e4, "total_variation": 1.0, "alpha": 1 / 0.24,
        "jsd": -0.3 * math.log(0.3) - 0.7 * math.log(0.7), "skew_forward_kl": -math.log(0.1),
        "skew_reverse_kl": -math.log(0.2),
    }  # fmt: skip
    for term in TERMS:
        assert d.divergence(student, teacher, term).item() == pytest.approx(expected[term.kind], rel=1e-5), term
        assert gradient(lambda z, t=term: d.divergence(z, teacher, t), student).isfinite().all(), term
    # The forward KL still pulls with full force there: q - p.
    pull = gradient(lambda z: d.forward_kl(z, teacher), student)
    torch.testing.assert_close(pull, torch.tensor([[1.0, 0.0, -1.0]]))


@each_term
def test_masked_words_are_deleted_words_or_make_the_loss_infinite(term: Divergence) -> None:
    student, teacher = logits(0), logits(1)
    both = torch.tensor([2, 7])
    masked = student.index_fill(1, both, -math.inf), teacher.index_fill(1, both, -math.inf)
    kept = [i for i in range(11) if i not in (2, 7)]
    value = d.divergence(*masked, term)
    torch.testing.assert_close(value, d.divergence(student[:, kept], teacher[:, kept], term))
    slope = gradient(lambda z: d.divergence(z, masked[1], term), masked[0])
    assert (slope[:, both] == 0).all()
    torch.testing.assert_close(
        slope[:, kept], gradient(lambda z: d.divergence(z, teacher[:, kept], term), student[:, kept])
    )
    for side, infinite in ((0, {"forward_kl"}), (1, {"reverse_kl"})):
        one = (masked[0], teacher) if side == 0 else (student, masked[1])
        value = d.divergence(*one, term)
        assert value.isinf().all() == (term.kind in infinite)
        assert not value.isnan().any()
        slope = gradient(lambda z, one=one: d.divergence(z, one[1], term), one[0])
        assert slope.isfinite().all()
        assert slope.abs().sum() == 0 if term.kind in infinite else slope.abs().sum() > 0


def test_standardised_logits_ignore_scale_and_shift() -> None:
    """Card 54 (arXiv 2403.01427): the identities that it lists."""
    student, teacher = logits(0), logits(1)
    spec = DivergenceSpec(terms=(Divergence("forward_kl"),), standardise=True, temperature=2.0)
    value = d.divergence(student, teacher, spec)
    torch.testing.assert_close(d.divergence(0.2 * student - 4, 5 * teacher + 9, spec), value, rtol=1e-6, atol=0)
    assert d.divergence(3 * teacher + 1, teacher, spec).max() < 1e-12
    slope = gradient(lambda z: d.divergence(z, teacher, spec), student)
    centred = student - student.mean(-1, keepdim=True)
    assert slope.sum(-1).abs().max() < 1e-12
    assert (slope * centred).sum(-1).abs().max() < 1e-6
    one_hot = torch.tensor([[50.0] + [0.0] * 9], dtype=DOUBLE)
    assert d.standardise(one_hot).max() == pytest.approx(9 / math.sqrt(10), rel=1e-6)
    constant = torch.full((1, 4), 3.0, dtype=DOUBLE)
    assert (d.standardise(constant) == 0).all()
    assert gradient(lambda z: d.divergence(z, teacher[:1, :4], spec), constant).isfinite().all()


def test_interpolated_targets() -> None:
    """Card 61 (arXiv 2501.16937): the gradient at t is softmax(z_S) - softmax((1 - t) z_S + t z_T)."""
    student, teacher = logits(0), logits(1)
    for t in (0.0, 0.4, 1.0):
        spec = DivergenceSpec(terms=(Divergence("cross_entropy"),), interpolation=t)
        stated = student.softmax(-1) - ((1 - t) * student + t * teacher).softmax(-1)
        torch.testing.assert_close(gradient(lambda z, s=spec: d.divergence(z, teacher, s), student), stated)


def test_several_teachers_are_a_mixture_of_probabilities() -> None:
    student, one, two = logits(0), logits(1), logits(2)
    kl = Divergence("reverse_kl")
    mixture = (0.25 * one.softmax(-1) + 0.75 * two.softmax(-1)).log()
    both = d.divergence(student, [one, two], kl, teacher_weights=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(both, d.divergence(student, mixture, kl))
    torch.testing.assert_close(d.divergence(student, [one], kl), d.divergence(student, one, kl))
    torch.testing.assert_close(d.divergence(student, [one, one], kl), d.divergence(student, one, kl))
    by_token = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 3)
    chosen = torch.cat([d.divergence(student, one, kl)[:2], d.divergence(student, two, kl)[2:]])
    torch.testing.assert_close(d.divergence(student, [one, two], kl, teacher_weights=by_token), chosen)


@each_term
@pytest.mark.parametrize("renormalise", [False, True])
def test_top_k_of_all_words_is_the_full_divergence(term: Divergence, renormalise: bool) -> None:
    student, teacher = logits(0), logits(1)
    top = teacher.log_softmax(-1).topk(11)
    targets = TopK(top.indices, top.values, renormalise=renormalise)
    torch.testing.assert_close(d.divergence(student, targets, term), d.divergence(student, teacher, term))
    slope = gradient(lambda z: d.divergence(z, targets, term), student)
    torch.testing.assert_close(slope, gradient(lambda z: d.divergence(z, teacher, term), student))


def test_top_k_tail_is_one_outcome() -> None:
    student, teacher = logits(0, tokens=1, words=5), logits(1, tokens=1, words=5)
    log_p = teacher.log_softmax(-1)
    ids = torch.tensor([[3, 0, -1]])
    targets = TopK(ids, log_p.gather(1, ids.clamp(0)))
    fold = lambda z: torch.stack([z[:, 3], z[:, 0], z[:, [1, 2, 4]].logsumexp(-1)], -1)  # noqa: E731
    torch.testing.assert_close(
        d.forward_kl(*d.top_k_outcomes(student, targets)), d.forward_kl(fold(student), fold(teacher))
    )
    given_tail = TopK(ids, targets.logprobs_TK, fold(log_p)[:, 2])
    same = d.divergence(student, given_tail, "reverse_kl")
    torch.testing.assert_close(same, d.divergence(student, targets, "reverse_kl"))


def test_tail_stops_a_student_from_draining_the_listed_words() -> None:
    """Without the tail, Σ over listed words of q ln q/p falls as their mass does (verl PR 5041); with it, KL rises."""
    teacher = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=DOUBLE).log()
    targets = TopK(torch.tensor([[0, 1]]), teacher[:, :2])
    values = [d.divergence(teacher - torch.tensor([[x, x, 0.0, 0.0]]), targets, "reverse_kl").item() for x in (0, 2, 4)]
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert values[0] < values[1] < values[2]


def test_labels_mix_in_and_can_be_missing() -> None:
    student, teacher = logits(0), logits(1)
    labels = torch.tensor([1, -100, 4, 0, 10])
    spec = DivergenceSpec(terms=(Divergence("forward_kl"),), label_weight=0.5, temperature=2.0, standardise=True)
    soft = d.divergence(student, teacher, DivergenceSpec(terms=spec.terms, temperature=2.0, standardise=True))
    hard = torch.nn.functional.cross_entropy(student, labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(d.divergence(student, teacher, spec, labels_T=labels), soft + 0.5 * hard)
    alone = d.divergence(student, None, DivergenceSpec(terms=(), label_weight=2.0), labels_T=labels)
    torch.testing.assert_close(alone, 2 * hard)


def test_soft_cap_and_scale() -> None:
    raw = torch.tensor([[-math.inf, -1e6, 0.5, 1e6]], dtype=DOUBLE)
    capped = d.scale_and_cap(raw, 2.0, 30.0)
    expected = torch.tensor([[-math.inf, -30.0, 30 * math.tanh(1 / 30), 30.0]], dtype=DOUBLE)
    torch.testing.assert_close(capped, expected)
    torch.testing.assert_close(d.scale_and_cap(raw, torch.tensor([2.0])), 2 * raw)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Divergence("kl"),  # pyright: ignore[reportArgumentType]
        lambda: Divergence("jsd"),
        lambda: Divergence("jsd", 1.5),
        lambda: Divergence("skew_reverse_kl", 1.0),
        lambda: Divergence("forward_kl", 0.5),
        lambda: DivergenceSpec(terms=()),
        lambda: DivergenceSpec(terms=(Divergence("jsd", 0.0), Divergence("forward_kl"))),
        lambda: DivergenceSpec(terms=(Divergence("forward_kl"),), temperature=0.0),
        lambda: DivergenceSpec(terms=(Divergence("forward_kl"),), interpolation=1.2),
        lambda: TopK(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4)),
        lambda: TopK(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2), renormalise=True),
    ],
)
def test_options_that_cannot_be_meant_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()
