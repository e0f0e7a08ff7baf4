"""Metrics of generative models against torchmetrics, prdc, and their definitions in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from workbench.evals.generation import (
    density_coverage,
    energy_distance,
    frechet_distance,
    kernel_distance,
    precision_recall,
)  # fmt: skip

Rows = NDArray[np.float64]
D = 16
#: A fixed map from images [N, 1, 6, 6] to features [N, 16]: both sides of a comparison get the images.
WEIGHTS = np.random.default_rng(42).standard_normal((36, D)) / 6


def features(images: Rows) -> Rows:
    return np.maximum(images.reshape(len(images), -1) @ WEIGHTS, 0)


def images(n: int, m: int) -> tuple[Rows, Rows]:
    rng = np.random.default_rng(0)
    return rng.random((n, 1, 6, 6)), rng.random((m, 1, 6, 6)) * 1.2 + 0.1


def torchmetrics_on(metric: str, real: Rows, generated: Rows, **options: Any) -> Any:
    """The value of torchmetrics' metric, which gets the images in batches and our features as its network."""
    torch = pytest.importorskip("torch", reason="the train extra is not installed")
    torch.set_num_threads(1)
    pytest.importorskip("torchmetrics", reason="the test extra is not installed")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Network(torch.nn.Module):
        num_features = D

        def forward(self, batch: Any) -> Any:
            return torch.from_numpy(features(batch.numpy()))

    theirs = {"fid": FrechetInceptionDistance, "kid": KernelInceptionDistance}[metric](Network(), **options)
    for samples, is_real in ((real, True), (generated, False)):
        for batch in torch.from_numpy(samples).split(64):
            theirs.update(batch, real=is_real)
    return theirs.compute()


def test_frechet_distance_is_torchmetrics_fid_on_the_same_features() -> None:
    real, generated = images(200, 150)
    theirs = float(torchmetrics_on("fid", real, generated))
    assert frechet_distance(real, generated, features=features) == pytest.approx(theirs, rel=1e-9)


# torchmetrics warns that KID keeps all features
@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
@pytest.mark.parametrize("options", [{}, {"degree": 2, "gamma": 0.3, "coef": 0.5}])
def test_kernel_distance_is_torchmetrics_kid_on_the_same_features(options: dict[str, Any]) -> None:
    real, generated = images(120, 120)
    mean, sd = torchmetrics_on("kid", real, generated, subsets=2, subset_size=120, **options)
    ours = kernel_distance(real, generated, features=features, subset_size=120, **options)
    assert ours.mean == pytest.approx(float(mean), rel=1e-9)
    assert float(sd) == pytest.approx(ours.sd, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_kernel_distance_over_random_subsets_is_torchmetrics_up_to_the_draw() -> None:
    real, generated = images(120, 100)
    mean, sd = (float(v) for v in torchmetrics_on("kid", real, generated, subsets=300, subset_size=40))
    ours = kernel_distance(real, generated, features=features, subset_size=40, num_subsets=300)
    assert abs(ours.mean - mean) < 4 * math.hypot(ours.sd, sd) / math.sqrt(300)
    assert ours.sd == pytest.approx(sd, rel=0.2)


def by_definition(real: Rows, generated: Rows, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage from their definitions, pair by pair, with closed balls."""

    def radius(rows: Rows, i: int) -> float:
        return sorted(math.dist(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    radii_r = [radius(real, i) for i in range(len(real))]
    radii_g = [radius(generated, j) for j in range(len(generated))]
    pairs = [[math.dist(x, y) for y in generated] for x in real]
    n, m = len(real), len(generated)
    return {
        "precision": sum(any(pairs[i][j] <= radii_r[i] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(pairs[i][j] <= radii_g[j] for j in range(m)) for i in range(n)) / n,
        "density": sum(pairs[i][j] <= radii_r[i] for i in range(n) for j in range(m)) / (k * m),
        "coverage": sum(any(pairs[i][j] <= radii_r[i] for j in range(m)) for i in range(n)) / n,
    }


def ours(real: Rows, generated: Rows, k: int) -> dict[str, float]:
    return precision_recall(real, generated, k=k)._asdict() | density_coverage(real, generated, k=k)._asdict()


@pytest.mark.parametrize(("n", "m", "d", "k", "seed"), [(40, 40, 2, 1, 0), (30, 50, 5, 3, 1), (60, 25, 20, 5, 2)])
def test_neighbours_follow_their_definitions(n: int, m: int, d: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    real, generated = rng.standard_normal((n, d)), 1.2 * rng.standard_normal((m, d)) + 0.5
    expected = by_definition(real, generated, k)
    assert ours(real, generated, k) == pytest.approx(expected)
    assert len({*expected.values()}) == 4
    assert 0 < expected["recall"] < 1


def test_neighbours_count_ties_as_inside() -> None:
    """On a lattice many distances are equal to a radius; integers far from 0 still give exact distances to `dist`."""
    rng = np.random.default_rng(3)
    real, generated = (1000 + rng.integers(*span).astype(np.float64) for span in ((0, 4, (40, 2)), (1, 6, (30, 2))))
    assert ours(real, generated, 3) == pytest.approx(by_definition(real, generated, 3))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_equal_prdc(k: int, capsys: pytest.CaptureFixture[str]) -> None:
    prdc = pytest.importorskip("prdc", reason="the test extra is not installed")
    rng = np.random.default_rng(k)
    real, generated = rng.standard_normal((150, 6)), 1.1 * rng.standard_normal((120, 6)) + 0.3
    theirs = prdc.compute_prdc(real, generated, nearest_k=k)
    capsys.readouterr()  # it prints
    assert ours(real, generated, k) == pytest.approx({key: float(value) for key, value in theirs.items()})


def test_energy_distance_follows_its_definition() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((20, 3)), rng.standard_normal((15, 3)) + 1
    across = np.mean([math.dist(x, y) for x in a for y in b])
    own = [[math.dist(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j] for rows in (a, b)]
    assert energy_distance(a, b) == pytest.approx(2 * across - np.mean(own[0]) - np.mean(own[1]))
