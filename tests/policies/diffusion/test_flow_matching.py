"""Flow matching: nobody has a smaller loss than the exact mixture, and a trained network's samples are the data's."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from torch import Tensor, nn  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.policies.diffusion.methods.flow_matching import FlowMatching  # noqa: E402
from workbench.policies.diffusion.networks import MLP  # noqa: E402
from workbench.policies.diffusion.oracle import gauss8  # noqa: E402
from workbench.policies.diffusion.predict import Predictor  # noqa: E402
from workbench.policies.diffusion.samplers import ode, prior, uniform_times  # noqa: E402
from workbench.policies.diffusion.schedules import Edm, RectifiedFlow, Trigonometric, VariancePreserving  # noqa: E402
from workbench.policies.loop.engine import LoopTrainer  # noqa: E402
from workbench.policies.loop.run import run_method  # noqa: E402
from workbench.policies.loop.settings import LoopSettings  # noqa: E402

torch.set_num_threads(1)


class Scaled(nn.Module):
    """The exact answer times a factor that trains, plus a shift."""

    def __init__(self, schedule, prediction: str) -> None:
        super().__init__()
        self.oracle = gauss8(num_classes=2, schedule=schedule)
        self.oracle.prediction = prediction  # pyright: ignore
        self.schedule, self.prediction, self.num_classes = schedule, prediction, 2
        self.factor, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.factor * self.oracle(x, t, c) + self.shift


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (RectifiedFlow(), "flow"), (RectifiedFlow(), "x0"), (VariancePreserving(), "eps"), (Trigonometric(), "v"),
        (Edm(t_max=2.0), "x0"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)  # fmt: skip
def test_the_exact_answer_is_the_minimum(schedule, prediction: str) -> None:
    """At the minimum the derivatives by a factor on it and by a shift of it are 0 but for sampling."""
    x0, c = gauss8(num_classes=2).sample(20000, torch.Generator().manual_seed(0))
    net = Scaled(schedule, prediction)
    settings = LoopSettings(steps=1, batch_size=20000, cpu=True, optimizer="sgd", momentum=0.0, max_grad_norm=0.0)
    (phase,) = FlowMatching(drop=0.3).phases()
    trainer = LoopTrainer(net, phase, {"data": {"x0": x0, "c": c}}, settings, {})
    losses: dict[str, float] = {}
    trainer.train(on_metrics=lambda _phase, _step, numbers: losses.update(numbers))
    moved = abs(1 - float(net.factor.detach())), abs(float(net.shift.detach()))
    assert max(moved) / settings.learning_rate < 0.05 * max(1.0, losses["loss"])
    assert losses["loss"] > 0.01


def test_a_trained_networks_samples_are_near_the_data_at_many_steps_and_not_at_one(tmp_path: Path) -> None:
    data = gauss8()
    x0, _ = data.sample(4096, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = MLP((2,), hidden=64, depth=2)
    settings = LoopSettings(steps=1000, batch_size=256, learning_rate=4e-3, schedule="cosine", cpu=True)
    run_method(net, FlowMatching(), {"data": {"x0": x0}}, settings, tmp_path)
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    off = {}
    for steps in (1, 40):
        with torch.no_grad():
            x = ode(Predictor(net), prior(z, net.schedule), uniform_times(net.schedule, steps))
        off[steps] = float((torch.cdist(x, data.means.float()).min(1).values < 0.5).float().mean())
    assert off[40] > 0.8
    assert off[1] < 0.1


def test_a_share_outside_of_0_to_1_is_refused() -> None:
    with pytest.raises(InputError, match="drop is a share"):
        FlowMatching(drop=-0.1)
