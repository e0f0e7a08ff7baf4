"""The bridge to diffusers: the same noise, the same conversions, and students that stock diffusers runs."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.errors import InputError, MissingExtra
from workbench.policies.diffusion import samplers
from workbench.policies.diffusion.consistency import total_derivative
from workbench.policies.diffusion.diffusers_bridge import DiffusersNet, export, load, scheduler_for, times_of
from workbench.policies.diffusion.diffusers_networks import dit2d, unet2d
from workbench.policies.diffusion.dit import DiT
from workbench.policies.diffusion.methods.consistency_distillation import ConsistencyDistillation
from workbench.policies.diffusion.methods.dmd2 import Dmd2
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.predict import Guided, Predictor
from workbench.policies.diffusion.schedules import (
    Edm,
    RectifiedFlow,
    Trigonometric,
    VariancePreserving,
    convert,
    index_of_time,
    time_of_index,
    translate,
)
from workbench.policies.diffusion.tabulated import Tabulated
from workbench.policies.diffusion.testbeds import Fit, fit, rows, student_of
from workbench.policies.digits import digits
from workbench.policies.loop.run import run_method
from workbench.policies.loop.settings import LoopSettings

diffusers: Any = pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[diffusion]'")

SCRIPT = Path(__file__).parents[2] / "support" / "stock_diffusers.py"
TABLES = [
    diffusers.DDPMScheduler(),
    diffusers.DDPMScheduler(beta_schedule="sigmoid"),
    diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    diffusers.LCMScheduler(prediction_type="sample"),
    diffusers.TCDScheduler(beta_schedule="squaredcos_cap_v2"),
]


def seeded(make: Any, seed: int = 0, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**options)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Oracle(nn.Module):
    """A stand-in for a model that notes what it is asked."""

    def __init__(self, out_channels: int = 1, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, sample_size=4, **config)
        self.out_channels = out_channels
        self.asked: list[Any] = []

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        self.asked.append((x, timestep, class_labels))
        answer = 2 * x + timestep.reshape(-1, 1, 1, 1) / 100
        return SimpleNamespace(sample=torch.cat([answer] * self.out_channels, 1))


# ---- schedules


@pytest.mark.parametrize("scheduler", TABLES, ids=lambda one: f"{type(one).__name__}-{one.config.beta_schedule}")
def test_table_is_the_schedulers(scheduler: Any) -> None:
    schedule = DiffusersNet(Oracle(), scheduler).schedule
    index = torch.arange(len(scheduler.alphas_cumprod))
    squared = scheduler.alphas_cumprod.double()
    for t in (index.double(), index.float()):
        assert torch.allclose(schedule.alpha(t).double().square(), squared, rtol=1e-6, atol=1e-15)
        assert torch.allclose(schedule.sigma(t).double().square(), 1 - squared, rtol=1e-6, atol=0)
    x0, eps = noise(1000, 1, 2, 2), noise(1000, 1, 2, 2, seed=2)
    theirs = scheduler.add_noise(x0, eps, index)
    assert (schedule.add_noise(x0, eps, index.float()) - theirs).abs().max() < 1e-6
    assert torch.allclose(time_of_index(index, squared, schedule), index.double(), atol=1e-6)
    assert torch.equal(index_of_time(index.double(), squared, schedule), index)
    assert (schedule.alpha(torch.tensor(-1.0)), schedule.sigma(torch.tensor(-1.0))) == (1, 0)


def test_table_between_its_steps() -> None:
    schedule = Tabulated(TABLES[0].alphas_cumprod)
    t = torch.linspace(-0.95, 998.9, 4001, dtype=torch.float64).requires_grad_()
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        (found,) = torch.autograd.grad(value(t).sum(), t)
        assert torch.allclose(found, slope(t), rtol=1e-9, atol=1e-15)
    there = schedule.time_of(3 * schedule.alpha(t), 3 * schedule.sigma(t))
    assert torch.allclose(there, t, atol=1e-7)
    assert torch.allclose(torch.autograd.grad(there.sum(), t)[0], torch.ones_like(t), atol=1e-6)
    at = torch.tensor([500.0], dtype=torch.float64)
    below = (schedule.sigma(at) - schedule.sigma(at - 1e-4)) / 1e-4
    assert torch.allclose(schedule.d_sigma(at), below, rtol=1e-5)  # at a node: towards the data
    assert schedule == Tabulated(TABLES[0].alphas_cumprod)
    assert hash(schedule) == hash(Tabulated(TABLES[0].alphas_cumprod))
    assert schedule != Tabulated(TABLES[2].alphas_cumprod)
    assert schedule != VariancePreserving()


def test_table_of_ddpm_is_nearly_the_continuous_process() -> None:
    net = unet2d(schedule=VariancePreserving(), prediction="eps")
    t = torch.arange(990.0, dtype=torch.float64)  # the last ones are noisier than the process' t_max
    gap = net.schedule.alpha(t) - VariancePreserving().alpha((t + 1) / 1000)
    assert 1e-5 < gap.abs().max() < 1e-3  # not the same process: hence the table
    x, matched = translate(noise(990, 2, dtype=torch.float64), t, net.schedule, VariancePreserving())
    back, again = translate(x, matched, VariancePreserving(), net.schedule)
    assert torch.allclose(again, t, atol=1e-4)
    assert torch.allclose(back, noise(990, 2, dtype=torch.float64), atol=1e-6)


def test_levels_of_flow_matching_and_edm() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = (flow.timesteps / 1000)[::100]
    x0, eps = noise(10, 1, 2, 2), noise(10, 1, 2, 2, seed=2)
    assert (RectifiedFlow().add_noise(x0, eps, t) - flow.scale_noise(x0, flow.timesteps[::100], eps)).abs().max() < 1e-6
    edm = diffusers.EDMEulerScheduler()
    edm.set_timesteps(18)
    ours = samplers.karras_times(Edm(), 18)
    assert torch.allclose(ours, times_of(edm), rtol=1e-6, atol=0)
    assert DiffusersNet(Oracle(), edm).schedule == Edm()


# ---- predictions


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_and_ddim_step_are_diffusers(kind: str) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind, timestep_spacing="trailing")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    net = DiffusersNet(Oracle(), scheduler)
    scheduler.set_timesteps(10)
    times = times_of(scheduler)
    x = noise(3, 1, 4, 4, dtype=torch.float64)
    for t, (now, then) in zip(scheduler.timesteps, pairwise(times), strict=True):
        now, then = now.expand(3), then.expand(3)
        theirs = scheduler.step(net(x, now), t, x)
        x0 = Predictor(net).x0(x, now)
        scale = 1 + theirs.pred_original_sample.abs().max()
        assert (x0 - theirs.pred_original_sample).abs().max() < 1e-6 * scale
        assert (samplers.ddim_step(Predictor(net), x, now, then) - theirs.prev_sample).abs().max() < 1e-6 * scale
    velocity = scheduler.get_velocity(x, -x, torch.tensor([400]))
    t = torch.full((3,), 400.0, dtype=torch.float64)
    x_t = net.schedule.add_noise(x, -x, t)
    assert (convert(x, x_t, t, net.schedule, "x0", "v") - velocity).abs().max() < 1e-6


def test_flow_and_edm_steps_are_diffusers() -> None:
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.EDMEulerScheduler(sigma_max=10.0),
        diffusers.EDMEulerScheduler(sigma_max=10.0, prediction_type="v_prediction"),
    ):
        net = DiffusersNet(Oracle(), scheduler)
        scheduler.set_timesteps(6)
        x = noise(3, 1, 4, 4) * scheduler.sigmas[0]
        ours = samplers.ode(Predictor(net), x, times_of(scheduler))
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if net.process == "edm" else x
            assert isinstance(net.model, Oracle)
            x = scheduler.step(net.model(scaled, t).sample, t, x).prev_sample
        assert (ours - x).abs().max() < 1e-5 * x.abs().max()


# ---- the network contract


def test_model_is_asked_as_its_scheduler_asks() -> None:
    x, t, c = noise(2, 1, 4, 4), torch.tensor([1.0, 500.25]), torch.tensor([3, 10])
    model = Oracle(out_channels=2, num_class_embeds=11)  # 2: a learned variance
    net = DiffusersNet(model, TABLES[2], num_classes=10)
    assert (net.prediction, net.num_classes, net.shape) == ("v", 10, (1, 4, 4))
    assert net(x, t, c).shape == x.shape
    assert torch.equal(net(x, t, c), model(x, t).sample[:, :1])
    net(x, t)
    (asked, at, labels), (_, _, null) = model.asked[0], model.asked[-1]
    assert torch.equal(asked, x)
    assert torch.equal(at, t)
    assert torch.equal(labels, c)
    assert null.tolist() == [10, 10]
    flow = Oracle()
    DiffusersNet(flow, diffusers.FlowMatchEulerDiscreteScheduler())(x, t / 1000, c)
    assert torch.allclose(flow.asked[0][1], t)
    assert flow.asked[0][2] is None
    with pytest.raises(InputError, match="second time"):
        net(x, t, c, t)


def test_model_without_null_label() -> None:
    net = DiffusersNet(Oracle(num_class_embeds=3), TABLES[0], num_classes=3)
    x, t = noise(2, 1, 4, 4), torch.ones(2)
    assert net(x, t, torch.tensor([0, 2])).shape == x.shape
    with pytest.raises(InputError, match="no null label"):
        Guided(Predictor(net), 2.0).x0(x, t, torch.tensor([0, 2]))


def test_dit_drops_no_labels_of_its_own() -> None:
    net = seeded(dit2d, num_classes=3, depth=1).train()
    x, t, c = noise(64, 1, 8, 8), torch.rand(64), torch.arange(64) % 3
    state = torch.random.get_rng_state()
    assert torch.equal(net(x, t, c), net(x, t, c))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(net(x, t), net(x, t, torch.full((64,), 3)))
    assert not torch.equal(net(x, t), net(x, t, c))


def test_derivative_is_by_difference() -> None:
    x, t, dx = noise(4, 1, 8, 8), torch.rand(4), noise(4, 1, 8, 8, seed=2)
    for make in (unet2d, dit2d):
        net = seeded(make).eval()
        with pytest.raises(InputError, match="derivative='difference'"):
            total_derivative(net, x, t, dx, torch.zeros(4))
        _, change = total_derivative(net, x, t, dx, torch.zeros(4), "difference", step=1e-2)
        with sdpa_kernel(SDPBackend.MATH):  # by two backward passes
            exact: Any = torch.autograd.functional.jvp(lambda x, net=net: net(x, t), x, dx)[1]
        assert (change - exact).norm() < 2e-3 * exact.norm()


# ---- what is refused


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="flow_prediction"):
        DiffusersNet(Oracle(), diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"))
    with pytest.raises(InputError, match="FlowMatch"):
        DiffusersNet(Oracle(), diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(InputError, match="give num_classes"):
        DiffusersNet(Oracle(num_class_embeds=11), TABLES[0])
    with pytest.raises(InputError, match="does not fit"):
        DiffusersNet(Oracle(num_class_embeds=11), TABLES[0], num_classes=12)
    with pytest.raises(InputError, match="Trigonometric"):
        unet2d(schedule=Trigonometric())
    with pytest.raises(InputError, match="second_time"):
        dit2d(second_time=True)
    with pytest.raises(InputError, match="unet2d"):
        unet2d(width=12)
    with pytest.raises(InputError, match="unet2d"):
        unet2d(shape=(1, 7, 7))
    with pytest.raises(InputError, match="dit2d"):
        dit2d(shape=(1, 8, 4))
    for make in (unet2d, dit2d):
        with pytest.raises(InputError, match="images"):
            make(shape=(2,))
    for ours in (DiT(), MLP()):
        with pytest.raises(InputError, match="students of a diffusers kind"):
            export(ours, tmp_path / "ours")
    with pytest.raises(InputError, match="sampler='ode'"):
        export(unet2d(schedule=Edm(), prediction="x0"), tmp_path / "edm")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="something else"):
        export(unet2d(), tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["mine.txt"]


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"\[diffusion\]"):
        unet2d()


# ---- a distilled student in stock diffusers


def distilled(folder: Path, net: DiffusersNet, method: Any) -> DiffusersNet:
    """A student of a teacher that has been trained for a moment; mechanics, not quality."""
    images, labels = digits()
    data = rows(images, labels)
    before = {name: one.clone() for name, one in net.state_dict().items()}
    fit(net, data, Fit(steps=12, batch_size=32))
    settings = LoopSettings(steps=3, batch_size=16, cpu=True)
    table = {"x0": images, "c": labels} if net.num_classes else {"x0": images}
    student = run_method(student_of(net), method, {"data": table}, settings, folder, models={"teacher": net})
    assert isinstance(student, DiffusersNet)
    for name, one in student.model.named_parameters():
        assert not torch.equal(one, before[f"model.{name}"]), name
    return student.eval()


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DiffusersNet, dict[str, Any]]]:
    """Each case's student and the row that the stock process reads; the folders are written and answered."""
    home = tmp_path_factory.mktemp("students")
    table = diffusers.DDPMScheduler(num_train_timesteps=200, beta_end=0.1)
    unet = DiffusersNet(seeded(unet2d).model, table)
    consistency = ConsistencyDistillation(num_times=5, grid="uniform", solver="ddim")
    eps = distilled(home / "run-eps", unet, consistency)
    flow = distilled(home / "run-flow", seeded(dit2d, num_classes=10, depth=2), Dmd2(gan=0, every=1))
    edm = seeded(unet2d, schedule=Edm(), prediction="x0").eval()
    sigmoid = diffusers.DDPMScheduler(num_train_timesteps=200, beta_schedule="sigmoid", prediction_type="v_prediction")
    other = DiffusersNet(edm.model, sigmoid)
    unet_case = {
        "model": "UNet2DModel",
        "part": "unet",
        "steps": [1, 4],
        "sigmas": False,
        "draws": False,
        "pipeline": "",
    }
    dit_case = unet_case | {"model": "DiTTransformer2DModel", "part": "transformer", "sigmas": True, "draws": True}
    euler = "FlowMatchEulerDiscreteScheduler"
    cases = {
        "lcm": (eps, "renoise", unet_case | {"scheduler": "LCMScheduler", "draws": True, "pipeline": "DDPMPipeline"}),
        "ddim": (eps, "ode", unet_case | {"scheduler": "DDIMScheduler", "pipeline": "DDIMPipeline"}),
        "flow": (flow, "ode", dit_case | {"scheduler": euler}),
        "flow-noise": (flow, "renoise", dit_case | {"scheduler": euler}),
        "edm": (edm, "ode", unet_case | {"scheduler": "EDMEulerScheduler"}),
        "betas": (other, "ode", unet_case | {"scheduler": "DDIMScheduler", "pipeline": "DDIMPipeline"}),
    }
    for name, (net, sampler, case) in cases.items():
        case["folder"] = str(home / name)
        export(net, home / name, sampler)
        given = {
            "x": noise(4, 1, 8, 8),
            "timestep": torch.tensor([0.0, 3.0, 150.0, 199.0]),
            "noise": noise(4, 1, 8, 8, seed=3),
        }
        if net.num_classes:
            given["c"] = torch.tensor([0, 3, 9, 10])
        save_file(given, case["folder"] + "-given.safetensors")
    (home / "cases.json").write_text(json.dumps([case for _, _, case in cases.values()]))
    done = subprocess.run([sys.executable, SCRIPT, home / "cases.json"], capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return {name: (net, case) for name, (net, _, case) in cases.items()}


@pytest.mark.parametrize("name", ["lcm", "ddim", "flow", "flow-noise", "edm", "betas"])
def test_student_in_stock_diffusers(students: dict[str, tuple[DiffusersNet, dict[str, Any]]], name: str) -> None:
    net, case = students[name]
    folder = Path(case["folder"])
    given, found = load_file(f"{folder}-given.safetensors"), load_file(f"{folder}-found.safetensors")
    weights = list(folder.rglob("*.safetensors"))
    assert [one.parent.name for one in weights] == [case["part"]]
    assert not [*folder.rglob("*.bin"), *folder.rglob("*.pt"), *folder.rglob("*.pkl")]
    c = given.get("c")
    with torch.no_grad():
        labels = {} if c is None else {"class_labels": c}
        assert (net.model(given["x"], given["timestep"], **labels).sample - found["answer"]).abs().max() < 1e-6
        for steps in case["steps"]:
            scheduler = scheduler_for(net, "renoise" if name in ("lcm", "flow-noise") else "ode")
            assert type(scheduler).__name__ == case["scheduler"]
            if case["sigmas"]:
                scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
            else:
                scheduler.set_timesteps(steps)
            times, predictor = times_of(scheduler), Predictor(net)
            assert len(times) == steps + 1
            x = given["noise"] * (80.0 if name == "edm" else 1.0)
            if name in ("lcm", "flow-noise"):
                ours = samplers.sde(predictor, x, times, torch.Generator().manual_seed(5), c)
            else:
                ours = samplers.ode(predictor, x, times, c, "ddim" if net.process == "table" else "euler")
            # in float32: relative to the largest number met, EDM's noise or the x0 of eps where alpha is small
            tolerance = 1e-6 * max(1.0, float(x.abs().max()), float(ours.abs().max()))
            assert (ours - found[f"sample{steps}"]).abs().max() < tolerance, steps
            if steps == 1:  # whatever the sampler, one step is the predicted x0
                x0 = predictor.x0(x, times[:1].expand(4), c)
                assert (x0 - found["sample1"]).abs().max() < tolerance
        if case["pipeline"]:
            x0 = Predictor(net).x0(noise(2, 1, 8, 8, seed=6), torch.full((2,), net.schedule.t_max))
            assert ((x0 / 2 + 0.5).clamp(0, 1) - found["images"]).abs().max() < 1e-6 * float(x0.abs().max())


def test_folder_is_read_back(students: dict[str, tuple[DiffusersNet, dict[str, Any]]], tmp_path: Path) -> None:
    for name, (net, case) in students.items():
        again = load(case["folder"], net.num_classes)
        assert (again.process, again.prediction, again.num_classes) == (net.process, net.prediction, net.num_classes)
        assert again.schedule == net.schedule, name
        for one, two in zip(again.parameters(), net.parameters(), strict=True):
            assert torch.equal(one, two)
    net, _ = students["ddim"]
    export(net, tmp_path / "twice", "ode")
    export(net, tmp_path / "twice", "renoise")  # over the earlier one
    config = json.loads((tmp_path / "twice" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "LCMScheduler"
    assert [one.name for one in tmp_path.iterdir()] == ["twice"]
    config["_class_name"] = "VQDiffusionScheduler"
    (tmp_path / "twice" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="VQDiffusionScheduler"):
        load(tmp_path / "twice")
