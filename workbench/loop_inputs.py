"""What a run on the loop engine reads: data, networks, and pools of pairs that are made where the store lacks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.data.records import digest
from workbench.data.store import Store
from workbench.errors import InputError
from workbench.loop_recipes import DataChoice, LoopRecipe, NetworkSource, Oracle, PoolChoice
from workbench.policies.loop import models

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.loop.models import LoopModel
    from workbench.policies.loop.view import Table

#: Rows drawn where a recipe gives no number.
_IN_THE_PLANE, _SHAPES, _DIGITS, _TEST_SHAPES = 16384, 4096, 1200, 1000


@dataclass(frozen=True, slots=True)
class Data:
    """Args: name: of the table that methods read; table: its rows; test: rows for the evaluation, of a generator the
    training data themselves; shape: of one datum; num_classes: 0 = none."""

    name: str
    table: Table
    test: Table
    shape: tuple[int, ...]
    num_classes: int

    def as_json(self) -> dict[str, Any]:
        """What the lineage says of them."""
        parts = [part for table in (self.table, self.test) for key, one in table.items() for part in (key, _bytes(one))]
        num = len(next(iter(self.table.values())))
        return {
            "num": num, "shape": list(self.shape), "num_classes": self.num_classes, "digest": digest("data", *parts)
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inputs:
    """Args: student: None where the method's student is an adapter; models: role -> network; tables: what methods read;
    pools: for the lineage; supplies: for the run's result."""

    data: Data
    student: LoopModel | None
    models: Mapping[str, LoopModel]
    tables: dict[str, Table]
    pools: list[dict[str, Any]] = field(default_factory=list)
    supplies: list[dict[str, Any]] = field(default_factory=list)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def load_data(chosen: DataChoice, backend: str) -> Data:
    """The recipe's data. Raises MissingExtra for digits without scikit-learn, InputError for an unfit file."""
    if chosen.path is not None:
        return _own_samples(chosen) if backend == "diffusion" else _own_images(chosen)
    return _images(chosen) if backend == "vision" else _samples(chosen)


def _samples(chosen: DataChoice) -> Data:
    import torch

    from workbench.policies.diffusion import testbeds
    from workbench.policies.diffusion.generation import TABLE
    from workbench.policies.diffusion.oracle import gauss8
    from workbench.policies.digits import digits

    generator = torch.Generator().manual_seed(chosen.seed)
    num_classes = chosen.classes
    if chosen.name == "digits":
        x0, c = digits()
        order = torch.randperm(len(x0), generator=generator)[: chosen.num]
        x0, c, num_classes = x0[order], c[order], 10
    elif chosen.name == "gauss8":
        x0, c = gauss8(chosen.classes).sample(chosen.num or _IN_THE_PLANE, generator)
    else:
        x0, c = testbeds.checkerboard_data(chosen.num or _IN_THE_PLANE, generator)
    table = {"x0": x0, "c": c} if num_classes else {"x0": x0}
    return Data(TABLE, table, table, tuple(x0.shape[1:]), num_classes)


def _images(chosen: DataChoice) -> Data:
    from workbench.policies.vision import testbeds
    from workbench.policies.vision.terms import TABLE

    if chosen.name == "shapes":
        train = testbeds.shapes(chosen.num or _SHAPES, chosen.seed)
        test = testbeds.shapes(_TEST_SHAPES, int(digest("test of shapes", str(chosen.seed)), 16) % 2**63)
        num_classes = len(testbeds.SHAPES)
    else:
        num = chosen.num or _DIGITS
        split = testbeds.digits(chosen.seed, num_train=num, num_labels=chosen.labels, noise=chosen.noise)
        train, test, num_classes = split.train, split.test, 10
        if len(test["label"]) == 0:
            raise InputError(f"data.num: {num} of the digits leave none to test on; take fewer than 1,797.")
    return Data(TABLE, train, test, tuple(train["image"].shape[1:]), num_classes)


def _own_samples(chosen: DataChoice) -> Data:
    from workbench.policies.diffusion.generation import TABLE

    table = _arrays(chosen, {"x0": "float32"}, {"c": "int64"})
    if table["x0"].ndim < 2:
        raise InputError(f"{chosen.path}: x0 must be [N, …], not {[*table['x0'].shape]}.")
    num_classes = int(table["c"].max()) + 1 if "c" in table else 0
    return Data(TABLE, table, table, tuple(table["x0"].shape[1:]), num_classes)


def _own_images(chosen: DataChoice) -> Data:
    from workbench.policies.vision.terms import TABLE

    found = _arrays(chosen, {"image": "float32", "label": "int64"}, {})
    test = _arrays(chosen, {"test_image": "float32", "test_label": "int64"}, {}, all_rows=True)
    test = {name.removeprefix("test_"): one for name, one in test.items()}
    if found["image"].ndim != 4 or test["image"].shape[1:] != found["image"].shape[1:]:
        raise InputError(
            f"{chosen.path}: image and test_image must be [N, channels, height, width] of one size, not "
            f"{[*found['image'].shape]} and {[*test['image'].shape]}."
        )
    num_classes = int(max(found["label"].max(), test["label"].max())) + 1
    return Data(TABLE, found, test, tuple(found["image"].shape[1:]), num_classes)


def _arrays(
    chosen: DataChoice, needed: Mapping[str, str], optional: Mapping[str, str], *, all_rows: bool = False
) -> dict[str, Tensor]:
    """Arrays of the recipe's *.npz by name; rows are drawn if there are more than asked for."""
    import numpy as np
    import torch

    place = Path(chosen.path or "").expanduser()
    try:
        with np.load(place, allow_pickle=False) as file:
            given = {name: file[name] for name in file.files if name in needed or name in optional}
            names = ", ".join(file.files) or "none"
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: a single array, *.npy
        raise InputError(f"{place} is no *.npz of arrays: {' '.join(str(error).split())[:200]}") from error
    if lacking := [name for name in needed if name not in given]:
        raise InputError(f"{place} has no array {lacking[0]!r}; it has {names}.")
    kinds = {name: kind for name, kind in {**needed, **optional}.items() if name in given}
    for name, kind in kinds.items():
        _check_array(f"{place}: {name}", given[name], kind == "int64")
    found = {name: torch.from_numpy(given[name].astype(kind)) for name, kind in kinds.items()}
    lengths = {len(one) for one in found.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(f"{place}: {', '.join(found)} must have one length above 0, not {sorted(lengths)}.")
    if all_rows or chosen.num is None:
        return found
    order = torch.randperm(next(iter(lengths)), generator=torch.Generator().manual_seed(chosen.seed))[: chosen.num]
    return {name: one[order] for name, one in found.items()}


def _check_array(place: str, given: Any, is_class: bool) -> None:
    """Numbers, and for classes one whole number from 0 a row."""
    import numpy as np

    if given.dtype.kind not in "biuf" or given.ndim == 0:
        raise InputError(f"{place} must be an array of numbers, not {given.dtype} of shape {[*given.shape]}.")
    if is_class and given.ndim != 1:
        raise InputError(f"{place} must be one class a row [N], not {[*given.shape]}.")
    if not np.isfinite(given).all() or (is_class and ((given < 0) | (given % 1 != 0)).any()):
        raise InputError(f"{place} holds numbers that are not finite, or classes below 0 or between whole numbers.")


class Gatherer:
    """Brings together what a run reads.

    Args: trained: path of a recipe -> folder of its model; say: told what is being done.
    """

    def __init__(
        self, recipe: LoopRecipe, store: Path, trained: Callable[[str], str], say: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.recipe, self.store, self.trained, self.say = recipe, store, trained, say

    def gather(self) -> Inputs:
        """Raises: InputError for networks that do not fit the data."""
        with Store(self.store):  # made or migrated, if need be, before anything long
            pass
        data = load_data(self.recipe.data, self.recipe.backend)
        given = {name: self._network(source, data, f"models.{name}") for name, source in self.recipe.models.items()}
        source = self.recipe.student
        student = None
        if source is not None:
            copied = source.copy
            student = models.copy_of(given[copied], copied) if copied else self._network(source, data, "student")
        tables, pools, supplies = {data.name: data.table}, [], []
        for name, chosen in self.recipe.pools.items():
            tables[name], described, supplied = self._pool(name, chosen, given[chosen.teacher], data)
            pools.append(described)
            supplies.append(supplied)
        return Inputs(data, student, given, tables, pools, supplies)

    def _network(self, source: NetworkSource, data: Data, place: str) -> LoopModel:
        if source.new is not None:
            new = source.new
            return models.make(new.kind, new.sizes, data.shape, data.num_classes, new.seed)
        if source.oracle is not None:
            return _oracle(source.oracle, data)
        model = models.load(self.trained(source.recipe) if source.recipe else source.folder or "")
        found = (tuple(model.config["shape"]), model.config["num_classes"])
        if found != (data.shape, data.num_classes) or models.KINDS[model.config["kind"]].backend != self.recipe.backend:
            raise InputError(
                f"{place} ({model.source}) is a {model.config['kind']} for data of the shape {[*found[0]]} and "
                f"{found[1]} classes, and {self.recipe.method} on {self.recipe.data.name} needs a network of "
                f"{self.recipe.backend} for {[*data.shape]} and {data.num_classes}."
            )
        return model

    def _pool(
        self, name: str, chosen: PoolChoice, teacher: LoopModel, data: Data
    ) -> tuple[Table, dict[str, Any], dict[str, Any]]:
        import torch

        from workbench.policies.diffusion import pools
        from workbench.policies.diffusion.predict import Predictor

        device = "cuda" if torch.cuda.is_available() and not self.recipe.settings.cpu else "cpu"
        sampling = pools.Sampling(
            steps=chosen.steps, solver=chosen.solver, guidance=chosen.guidance, seed=chosen.seed,
            precision=chosen.precision,
        )  # fmt: skip
        pool = pools.supply(
            self.store, Predictor(teacher.net.to(device)), teacher.version, data.shape, chosen.num, sampling,
            device=device, say=lambda text: self.say(f"{name}: {text}"),
        )  # fmt: skip
        described = {
            "table": name, "teacher": chosen.teacher, "version": teacher.version, "num": chosen.num,
            "sampling": asdict(sampling), "digest": pool.digest,
        }  # fmt: skip
        return pool.table, described, {**described, "reused": chosen.num - pool.made, "made": pool.made}


def _oracle(name: Oracle, data: Data) -> LoopModel:
    from workbench.policies.diffusion import oracle
    from workbench.policies.versions import weights_version

    made = {"gauss8": lambda: oracle.gauss8(data.num_classes), "checkerboard": oracle.checkerboard}[name]()
    if data.shape != (2,) or data.num_classes != made.num_classes:
        raise InputError(f"The oracle {name} is a mixture in the plane; the data have another shape or classes.")
    config = {"kind": "oracle", "shape": list(data.shape), "num_classes": made.num_classes}
    return models.LoopModel(made, config, weights_version(made), f"exact mixture {name}")
