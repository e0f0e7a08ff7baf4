"""The classifier of digits as a feature network: accurate, repeatable, and its distances order spoilt digits."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from workbench.errors import InputError, MissingExtra
from workbench.evals import generation_features
from workbench.evals.generation import class_shares, frechet_distance
from workbench.evals.generation_features import DigitsNetwork, digits_network

torch: Any = pytest.importorskip("torch", reason="the train extra is not installed")
datasets: Any = pytest.importorskip("sklearn.datasets", reason="the train extra is not installed")

Rows = NDArray[np.float64]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network() -> DigitsNetwork:
    return digits_network()


@pytest.fixture(scope="module")
def digits() -> tuple[Rows, NDArray[np.int64]]:
    loaded = datasets.load_digits()
    return loaded.images / 16, loaded.target


def test_it_knows_digits_it_has_not_seen(network: DigitsNetwork, digits: tuple[Rows, Any]) -> None:
    images, labels = digits
    assert network.accuracy > 0.93
    probabilities = network.probabilities(images)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(len(images)), abs=1e-5)
    assert (probabilities.argmax(axis=1) == labels).mean() > 0.97


def test_training_is_repeatable_cached_and_leaves_random_numbers_alone(
    network: DigitsNetwork, digits: tuple[Rows, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digits_network().body is network.body
    monkeypatch.setattr(generation_features, "NUM_EPOCHS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: threads.append(num))
    threads: list[int] = []
    torch.manual_seed(5)
    first = generation_features._trained.__wrapped__(3)
    drawn = torch.rand(3)
    assert threads == [1, torch.get_num_threads()]
    again, other = (generation_features._trained.__wrapped__(seed) for seed in (3, 4))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    images = torch.tensor(digits[0][:50, None], dtype=torch.float32)
    assert torch.equal(first[0](images), again[0](images))
    assert not torch.equal(first[0](images), other[0](images))
    assert not any(p.requires_grad for p in first[0].parameters())


def test_shapes_kinds_and_ranges_of_samples(network: DigitsNetwork, digits: tuple[Rows, Any]) -> None:
    images = digits[0][:30]
    expected = network.features(images)
    assert expected.shape == (30, generation_features.NUM_FEATURES)
    assert expected.dtype == np.float64
    assert np.array_equal(network.features(images.reshape(30, 64)), expected)
    assert np.array_equal(network.features(torch.tensor(images)[:, None]), expected)
    signed = digits_network(value_range=(-1, 1))
    assert signed.body is network.body
    assert np.allclose(signed.features(2 * images - 1), expected, atol=1e-5)
    assert not np.allclose(signed.features(images), expected, atol=1e-2)


def test_features_do_not_depend_on_the_batches(
    network: DigitsNetwork, digits: tuple[Rows, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = network.features(digits[0][:30])
    monkeypatch.setattr(generation_features, "_ROWS_AT_ONCE", 7)
    assert np.allclose(network.features(digits[0][:30]), expected, atol=1e-5)


def test_distance_grows_with_noise_and_sees_a_missing_class(network: DigitsNetwork, digits: tuple[Rows, Any]) -> None:
    images, labels = digits
    rng = np.random.default_rng(0)
    real, other, _ = images[rng.permutation(len(images))].reshape(3, -1, 8, 8)
    noise = rng.standard_normal(other.shape)
    distances = [
        frechet_distance(real, other + level * noise, features=network.features) for level in (0, 0.1, 0.3, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[3] > 20 * distances[0]
    without = images[labels != 3]
    assert frechet_distance(images, without, features=network.features) > 0.05
    shares = class_shares(without, network.probabilities)
    assert shares.smallest_share == pytest.approx(10 * shares.shares[3])
    assert shares.smallest_share < 0.1
    assert class_shares(images, network.probabilities).smallest_share > 0.9


def test_refusals(network: DigitsNetwork) -> None:
    with pytest.raises(InputError, match="8 x 8 pixels; these samples have 784 numbers"):
        network.features(np.zeros((2, 28, 28)))
    with pytest.raises(InputError, match="not finite"):
        network.features(np.full((2, 8, 8), np.nan))
    with pytest.raises(InputError, match="must go up, not from 1 to 1"):
        digits_network(value_range=(1, 1))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"need torch and scikit-learn.*\[train\]"):
        generation_features._trained.__wrapped__(0)
