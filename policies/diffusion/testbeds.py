"""Toys that train in seconds on a CPU: data, a flow-matching teacher, students. One thread and a seed give one result.

Quality is known (measured in the tests): a teacher's 50-step samples are close to the data, its one-step ones are not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.oracle import gauss8
from workbench.policies.diffusion.predict import Predictions
from workbench.policies.diffusion.schedules import combine
from workbench.policies.digits import digits

Toy = Literal["gauss8", "checkerboard", "digits"]
#: Data and labels of a batch: (count, generator) -> x0 [count, *shape] float32, c [count] long.
Data = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Fit:
    """How long and how to train by flow matching; the defaults are the full profile of the teachers.

    Args: learning_rate: Adam's, falling to 0 by a cosine; label_drop: fraction of labels replaced by the null label.
    """

    steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 2e-3
    label_drop: float = 0.1
    seed: int = 0


def checkerboard_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform on the eight dark fields of a 4 x 4 board on [-2, 2]^2; labels are 0."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    corner = torch.stack([column, row], 1) - 2
    return corner + torch.rand(count, 2, generator=generator), torch.zeros(count, dtype=torch.long)


def gauss8_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples of `oracle.gauss8`; labels are 0."""
    return gauss8().sample(count, generator)


def rows(x0: Tensor, c: Tensor) -> Data:
    """A finite data set, drawn with replacement."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(x0), (count,), generator=generator)
        return x0[index], c[index]

    return draw


def toy_data(toy: Toy) -> Data:
    """Raises: InputError for an unknown toy."""
    if toy == "gauss8":
        return gauss8_data
    if toy == "checkerboard":
        return checkerboard_data
    if toy == "digits":
        return rows(*digits())
    raise InputError(f"Toy {toy!r}: give gauss8, checkerboard or digits.")


def fit(net: nn.Module, data: Data, settings: Fit, teacher: Predictions | None = None) -> nn.Module:
    """Trains `net` in place to predict, at t uniform in [t_min, t_max], and leaves it in eval mode.

    Args: net: by the network contract; data: draws x0 and c; teacher: regress on its prediction instead of the
        sample's own (x0, eps): same minimum, without the noise of the target.
    Loss: mean squared error of the net's own parameterisation. Returns: net.
    """
    contract: Any = net
    schedule, classes = contract.schedule, contract.num_classes
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    net.train()
    for _ in range(settings.steps):
        x0, c = data(settings.batch_size, generator)
        eps = torch.randn(x0.shape, generator=generator)
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.rand(len(x0), generator=generator)
        drop = torch.rand(len(x0), generator=generator) < settings.label_drop
        c = torch.where(drop, classes, c) if classes else None
        x_t = schedule.add_noise(x0, eps, t)
        if teacher is None:
            target = combine(x0, eps, t, schedule, contract.prediction)
        else:
            with torch.no_grad():
                target = teacher.predict(x_t, t, c, contract.prediction)
        loss = (net(x_t, t, c) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        falling.step()
    return net.eval()


def toy_net(toy: Toy, hidden: int, depth: int, seed: int, **options: Any) -> MLP:
    """An untrained MLP for the toy; `options` are of MLP. Leaves the global random state as it was."""
    shape = (1, 8, 8) if toy == "digits" else (2,)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(shape, hidden, depth, **options)


def toy_teacher(toy: Toy, fast: bool = False, settings: Fit | None = None, **options: Any) -> MLP:
    """A rectified-flow teacher, frozen: 2-D 96 wide, 3 deep; digits 256 wide, 4 deep, with classes.

    Args: fast: a profile for tests (fewer steps, smaller for digits); settings: instead of the profile's; options: of
        MLP, `hidden` and `depth` included.
    """
    if settings is None:
        settings = Fit(steps=800 if fast else 3000, learning_rate=4e-3 if fast else 2e-3)
    sizes: dict[str, Any] = {"hidden": 96, "depth": 3}
    if toy == "digits":
        sizes = {"hidden": 128 if fast else 256, "depth": 3 if fast else 4, "num_classes": 10}
    net = toy_net(toy, seed=settings.seed, **{**sizes, **options})
    fit(net, toy_data(toy), settings)
    return net.requires_grad_(False)


def student_of(net: nn.Module) -> Any:
    """A trainable copy: every floating parameter requires gradients, whatever the original's did."""
    student = copy.deepcopy(net).train()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return student


def warm_student(
    teacher: Predictions, data: Data, steps: int = 600, hidden: int = 64, depth: int = 3, seed: int = 0, **options: Any
) -> MLP:
    """A smaller 2-D network that has regressed on the teacher for some steps: where distillation tests start.

    Its many-step samples are good and its one-step ones are not. Args: options: of MLP, e.g. second_time.
    """
    settings = Fit(steps=steps, learning_rate=4e-3, seed=seed)
    net = toy_net("gauss8", hidden, depth, seed, schedule=teacher.schedule, num_classes=teacher.num_classes, **options)
    fit(net, data, settings, teacher)
    return net.train()
