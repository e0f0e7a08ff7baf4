"""Recipes on a person's own arrays, and students that stock diffusers can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

torch.set_num_threads(1)

from loop_recipes_made import FLOW, LABELS, loop_recipe  # noqa: E402
from training_made import query  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.train import train  # noqa: E402

RANDOM = np.random.default_rng(0)
IMAGES: dict[str, Any] = {
    "image": RANDOM.random((48, 2, 4, 4)), "label": RANDOM.integers(0, 3, 48),
    "test_image": RANDOM.random((12, 2, 4, 4)), "test_label": np.arange(12) % 3,
}  # fmt: skip
SAMPLES: dict[str, Any] = {"x0": RANDOM.standard_normal((64, 5)), "c": np.arange(64) % 3}


def own(folder: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    np.savez(folder / "own.npz", **arrays)
    return {"name": "file", "path": str(folder / "own.npz")}


def test_samples_of_ones_own(tmp_path: Path) -> None:
    result = train(loop_recipe(tmp_path, FLOW, data=own(tmp_path, SAMPLES)), tmp_path / "s.duckdb")
    assert result.metrics["student@1/sliced_wasserstein"] > 0
    ((lineage,),) = query(tmp_path, "SELECT lineage->>'$.data' FROM runs")
    assert '"num":64,"shape":[5],"num_classes":3' in lineage
    again = loop_recipe(tmp_path, FLOW, data=own(tmp_path, {"x0": SAMPLES["x0"][:32]}))
    assert train(again, tmp_path / "s.duckdb").run_id != result.run_id  # other data under the same name


def test_images_of_ones_own(tmp_path: Path) -> None:
    data = own(tmp_path, IMAGES)
    result = train(loop_recipe(tmp_path, LABELS, data=data, settings={"steps": 2}), tmp_path / "s.duckdb")
    assert 0 <= result.metrics["student/accuracy"] <= 1


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((3, 2))}, "no array 'x0'; it has x"),
        ({"x0": np.zeros(3)}, r"must be \[N, …\]"),
        ({"x0": np.zeros((3, 2)), "c": np.zeros(4)}, "one length above 0"),
        ({"x0": np.full((3, 2), np.nan)}, "not finite"),
        ({"x0": np.zeros((3, 2)), "c": np.array([0, 1, -1])}, "classes below 0"),
        ({"x0": np.array([{}, {}])}, "no \\*.npz of arrays"),
        ({"x0": np.zeros((3, 2)), "c": np.zeros((3, 4))}, r"c must be one class a row \[N\], not \[3, 4\]"),
        ({"x0": np.zeros((3, 2)), "c": np.array([0, 0.5, 1])}, "classes below 0 or between whole numbers"),
        ({"x0": np.float64(1)}, r"x0 must be an array of numbers, not float64 of shape \[\]"),
        ({"x0": np.zeros((3, 2)), "c": np.array(["cat", "dog", "cat"])}, "c must be an array of numbers"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        train(loop_recipe(tmp_path, FLOW, data=own(tmp_path, arrays)), tmp_path / "s.duckdb")


def test_a_path_goes_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a file has a path"):
        loop_recipe(tmp_path, FLOW, data={"name": "file"})
    with pytest.raises(InputError, match=r"is no \*.npz"):
        train(loop_recipe(tmp_path, FLOW, data={"name": "file", "path": str(tmp_path / "none.npz")}), tmp_path / "s")
    np.save(tmp_path / "one.npy", SAMPLES["x0"])
    with pytest.raises(InputError, match=r"is no \*.npz"):
        train(loop_recipe(tmp_path, FLOW, data={"name": "file", "path": str(tmp_path / "one.npy")}), tmp_path / "s")


@pytest.mark.parametrize("kind", ["unet2d", "dit2d"])
def test_a_student_of_diffusers_is_exported(tmp_path: Path, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    size = {"unet2d": {"width": 8}, "dit2d": {"width": 16, "depth": 1}}[kind]
    data = own(tmp_path, {"x0": RANDOM.standard_normal((32, 1, 4, 4))})
    student = {"new": {"kind": kind, **size}}
    result = train(
        loop_recipe(tmp_path, FLOW, student=student, data=data, settings={"steps": 2}), tmp_path / "s.duckdb"
    )
    ((folder,),) = query(tmp_path, "SELECT path FROM artifacts WHERE kind = 'diffusers'")
    cls, part = {
        "unet2d": (diffusers.UNet2DModel, "unet"), "dit2d": (diffusers.DiTTransformer2DModel, "transformer")
    }[kind]  # fmt: skip
    stock = cls.from_pretrained(folder, subfolder=part).eval()
    from workbench.policies.loop.models import load

    ours = load(result.model).net.model
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))
