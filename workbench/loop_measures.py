"""What people look at when a run on the loop engine has ended: distances of samples to data, accuracies, a picture.

The distances are in the data's own space (pixels, or the plane): sliced Wasserstein, above 0 even for two draws of one
distribution, and the unbiased energy distance, around 0 for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench import png
from workbench.evals.generation import energy_distance, sliced_wasserstein
from workbench.loop_recipes import EvaluationChoice

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.loop_inputs import Data
    from workbench.policies.diffusion.schedules import Schedule
    from workbench.policies.loop.view import Table


def generator_samples(nets: Mapping[str, Any], chosen: EvaluationChoice, data: Data) -> dict[str, Tensor]:
    """ "student@1" -> samples [num, *shape], for each number of steps; all of the same noise and classes.

    Args: nets: "student" and perhaps "teacher", on the CPU.
    """
    import torch

    generator = torch.Generator().manual_seed(chosen.seed)
    z = torch.randn(chosen.num, *data.shape, generator=generator)
    c = torch.randint(data.num_classes, (chosen.num,), generator=generator) if data.num_classes else None
    found = {}
    # A student learns at steps of the teacher's schedule, which its own need not share.
    schedule = nets["teacher" if "teacher" in nets else "student"].schedule
    with torch.no_grad():
        for name, net in nets.items():
            for steps in chosen.teacher_steps if name == "teacher" else chosen.student_steps:
                noise = torch.Generator().manual_seed(chosen.seed + 1)
                if name == "teacher" or chosen.sampler == "ode":
                    made = _by_ode(net, z, c, steps, chosen.guidance if name == "teacher" else 1.0)
                else:
                    made = _by_renoising(net, schedule, z, c, steps, chosen.start, noise)
                found[f"{name}@{steps}"] = made
    return found


def _by_ode(net: Any, z: Tensor, c: Tensor | None, steps: int, guidance: float) -> Tensor:
    from workbench.policies.diffusion.predict import Guided, Predictor
    from workbench.policies.diffusion.samplers import ode, prior, uniform_times

    predictor = Guided(Predictor(net), guidance)
    return ode(predictor, prior(z, net.schedule), uniform_times(net.schedule, steps), c, "ddim")


def _by_renoising(
    net: Any, schedule: Schedule, z: Tensor, c: Tensor | None, steps: int, start: float, noise: Any
) -> Tensor:
    import torch

    from workbench.policies.diffusion.generation import simulate, step_times
    from workbench.policies.diffusion.predict import Predictor

    times = step_times(schedule, steps, start, len(z))
    noises = [torch.randn(z.shape, generator=noise) for _ in range(steps - 1)]
    return simulate(Predictor(net, schedule), z, times, noises, c)


def distances(samples: Mapping[str, Tensor], real: Tensor) -> dict[str, float]:
    """ "student@1/energy_distance" and "…/sliced_wasserstein" of each, to real data [N, *shape]."""
    found = {}
    for name, generated in samples.items():
        found[f"{name}/sliced_wasserstein"] = sliced_wasserstein(real, generated)
        found[f"{name}/energy_distance"] = energy_distance(real, generated)
    return found


def picture(samples: Mapping[str, Tensor]) -> png.Grey:
    """All of them side by side, in their order."""
    return png.side_by_side([png.panel(one.numpy()) for one in samples.values()])


def accuracies(nets: Mapping[str, Any], test: Table) -> dict[str, float]:
    """ "student/accuracy" (0 to 1) and "student/nll" (nats an image) of each classifier on a table."""
    from workbench.policies.vision.testbeds import measure

    found = {}
    for name, net in nets.items():
        measured = measure(net, test)
        found |= {f"{name}/accuracy": measured.accuracy, f"{name}/nll": measured.nll}
    return found
