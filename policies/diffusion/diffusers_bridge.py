"""Networks of diffusers by the contract of `predict`, and students written as folders that stock diffusers loads.

| scheduler | schedule, its time | prediction | what the model is asked |
|---|---|---|---|
| DDPM, DDIM, LCM, TCD | `Tabulated`, t = index | eps, v or x0 | x_t at timestep t |
| FlowMatch* | `RectifiedFlow` | flow | x_t at timestep 1000 t |
| EDMEuler, EDMDPMSolverMultistep | `Edm` | x0 | c_in x_t at ln(t) / 4; its output is preconditioned |

Our own MLP and DiT cannot be exported: their time features and input scaling are in no model of diffusers. Those of
`diffusers_networks` can. torch.func.jvp fails in them (UNet2DModel: a view of a dual tensor; DiTTransformer2DModel: no
forward mode in SDPA's default CPU kernel): take the derivative "difference" of `consistency.total_derivative`.

Nothing is downloaded or unpickled. diffusers is imported when a function needs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.errors import InputError, MissingExtra
from workbench.policies.diffusion.schedules import Edm, Prediction, RectifiedFlow, Schedule, expand
from workbench.policies.diffusion.tabulated import Tabulated

Process = Literal["table", "flow", "edm"]
#: How the exported scheduler goes on from a prediction: by the same noise, or by x0 and fresh noise.
Sampler = Literal["ode", "renoise"]
_TABLES = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler")
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
#: diffusers' names of predictions.
PREDICTION_TYPES: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class DiffusersNet(nn.Module):
    """A model of diffusers, `model`, by the network contract; "model.…" are the paths of its modules.

    Args:
        model: called as model(x, timestep[, class_labels=c]), answers with `.sample`; of more output than input
            channels (a learned variance) the first are taken. Class dropout inside the model is switched off: labels
            are dropped by who trains it.
        scheduler: says how the model was trained, see the module's table; thresholding and clipping are not applied.
        num_classes: DiTTransformer2DModel: all of its classes by default; UNet2DModel: must be given if it has class
            embeddings; row num_classes is the null label. A model with as many rows as classes has none.

    Raises: InputError for a scheduler or numbers of classes that do not fit.
    """

    def __init__(self, model: nn.Module, scheduler: Any, num_classes: int | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.scheduler = scheduler
        self.process, self.schedule, self.prediction = _process(scheduler)
        config = self.model.config
        embedded = getattr(config, "num_embeds_ada_norm", None)
        # rows: of the table of class embeddings
        self.rows: int = embedded + 1 if embedded else getattr(config, "num_class_embeds", None) or 0
        if num_classes is None and self.rows and not embedded:
            raise InputError(f"The model has {self.rows} class embeddings: give num_classes, without the null label.")
        self.num_classes: int = (embedded or 0) if num_classes is None else num_classes
        if not 0 <= self.num_classes <= self.rows:
            raise InputError(f"num_classes {self.num_classes} does not fit {self.rows} class embeddings of the model.")
        # a model without null label has none to fall back on
        self.null: int = embedded or self.num_classes
        size = config.sample_size
        self.shape = (config.in_channels, *(size if isinstance(size, Sequence) else (size, size)))
        for module in model.modules():
            labels: Any = module
            if type(module).__name__ == "LabelEmbedding":  # it would draw from torch's global random state
                labels.dropout_prob = 0.0

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """x [B, *shape], t [B], c [B] long -> like x. Raises InputError for r and a missing null label."""
        if r is not None:
            raise InputError("A network of diffusers takes no second time r.")
        if self.process == "table":
            return self._ask(x, t, c)
        if self.process == "flow":
            return self._ask(x, t * self.scheduler.config.num_train_timesteps, c)
        data, sigma = self.scheduler.config.sigma_data, expand(t, x)
        power = (sigma.square() + data**2).sqrt()
        sign = -1 if self.scheduler.config.prediction_type == "v_prediction" else 1
        return (data / power) ** 2 * x + sign * sigma * data / power * self._ask(x / power, t.log() / 4, c)

    def _ask(self, x: Tensor, timestep: Tensor, c: Tensor | None) -> Tensor:
        given = {}
        if self.rows:
            if c is None or not self.num_classes:
                c = torch.full((len(x),), self.null, device=x.device)
            if self.rows == self.num_classes and bool((c >= self.rows).any()):
                raise InputError("The model has no null label: every row needs a class, and there is no guidance.")
            given["class_labels"] = c
        return self.model(x, timestep.float(), **given).sample[:, : x.shape[1]]


def load(folder: str | Path, num_classes: int | None = None) -> DiffusersNet:
    """A network from a folder of diffusers: unet/ or transformer/, and scheduler/; safetensors only.

    Args: num_classes: as in `DiffusersNet`. Raises: InputError for what is no such folder.
    """
    folder, diffusers = Path(folder).expanduser(), the_package()
    component = "unet" if (folder / "unet").is_dir() else "transformer"
    try:
        name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))["_class_name"]
        if name not in (*_TABLES, *_FLOWS, *_EDMS):
            raise ValueError(f"its scheduler is {name!r}, not one of {', '.join((*_TABLES, *_FLOWS, *_EDMS))}.")
        scheduler = getattr(diffusers, name).from_pretrained(folder / "scheduler", local_files_only=True)
        model = diffusers.AutoModel.from_pretrained(
            str(folder / component), use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    return DiffusersNet(model, scheduler, num_classes)


def export(net: nn.Module, folder: str | Path, sampler: Sampler = "renoise") -> None:
    """Writes a folder that stock diffusers loads: unet/ or transformer/ (with safetensors), and scheduler/.

    An unconditional UNet2DModel outside EDM gets model_index.json too, for DiffusionPipeline.from_pretrained. The other
    models have no stock pipeline without a VAE or text encoder: model and scheduler are loaded by their classes.

    Args: folder: new, empty or of an earlier export, which is replaced; sampler: as in `scheduler_for`.
    Raises: InputError for a network of another kind (merge the adapters of one first), or a folder with other things.
    """
    if not isinstance(net, DiffusersNet):
        raise InputError(
            f"A {type(net).__name__} cannot be exported to diffusers, which has no model with its parameters: only "
            "students of a diffusers kind can (unet2d, dit2d, or a copy of a teacher that diffusers made)."
        )
    folder, scheduler = Path(folder).expanduser(), scheduler_for(net, sampler)
    if folder.exists() and not (folder / "scheduler" / "scheduler_config.json").is_file() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else than an export to diffusers: give a new folder.")
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    kind = type(net.model).__name__
    if kind == "UNet2DModel" and not net.rows and net.process != "edm":
        diffusers = the_package()
        pipeline = diffusers.DDPMPipeline if sampler == "renoise" or net.process == "flow" else diffusers.DDIMPipeline
        pipeline(unet=net.model, scheduler=scheduler).save_pretrained(unfinished, safe_serialization=True)
    else:
        component = "unet" if kind.startswith("UNet") else "transformer"
        net.model.save_pretrained(unfinished / component, safe_serialization=True)
        scheduler.save_pretrained(unfinished / "scheduler")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def scheduler_for(net: DiffusersNet, sampler: Sampler) -> Any:
    """The stock scheduler whose steps are those of our samplers, without clipping.

    "ode": DDIM or (Flow-Match, EDM) Euler. "renoise": LCM, or Flow-Match Euler with fresh noise. LCM mixes a share of
    2.5e-9 to 3e-6 of x_t into the x0 of times from 999 down to 29. Fewer than all of Flow-Match's own steps are
    crowded at the ends: give it sigmas (set_timesteps(sigmas=[1, 0.5])). LCM takes 50 steps at most.
    Raises: InputError for "renoise" on EDM, for which there is none.
    """
    diffusers, config = the_package(), net.scheduler.config
    if net.process == "edm":
        if sampler == "renoise":
            raise InputError("diffusers has no scheduler that re-noises EDM's x0: export with sampler='ode'.")
        keys = ("sigma_min", "sigma_max", "sigma_data", "num_train_timesteps", "prediction_type")
        return diffusers.EDMEulerScheduler(**{key: config[key] for key in keys})
    if net.process == "flow":
        keys = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "time_shift_type")
        given = {key: config[key] for key in keys if key in config}
        return diffusers.FlowMatchEulerDiscreteScheduler(**given, stochastic_sampling=sampler == "renoise")
    cls = diffusers.DDIMScheduler if sampler == "ode" else diffusers.LCMScheduler
    keys = ("num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")
    given = {key: config[key] for key in keys} | {"clip_sample": False, "timestep_spacing": "trailing"}
    if config.trained_betas is None and config.beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        return cls(**given, **{key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")})
    return cls(**given | {"rescale_betas_zero_snr": False}, trained_betas=net.scheduler.betas.tolist())


def times_of(scheduler: Any) -> Tensor:
    """[K + 1] float64, the grid for `samplers.ode` and `sde` with the times of a scheduler after set_timesteps(K).

    DDIM's own steps meet only if K divides num_train_timesteps.
    """
    if _process(scheduler)[0] != "table":
        return scheduler.sigmas.double()
    end = -1.0 if getattr(scheduler.config, "set_alpha_to_one", True) else 0.0
    return torch.cat([scheduler.timesteps.double(), torch.tensor([end], dtype=torch.float64)])


def _process(scheduler: Any) -> tuple[Process, Schedule, Prediction]:
    name, config = type(scheduler).__name__, scheduler.config
    if name in _EDMS and config.prediction_type in ("epsilon", "v_prediction"):
        return "edm", Edm(config.sigma_min, config.sigma_max), "x0"
    if name in _FLOWS and not config.invert_sigmas:
        return "flow", RectifiedFlow(), "flow"
    if name in _TABLES and config.prediction_type in PREDICTION_TYPES:
        return "table", Tabulated(scheduler.alphas_cumprod), PREDICTION_TYPES[config.prediction_type]
    raise InputError(
        f"{name} (prediction_type {config.get('prediction_type')!r}) cannot be read: there are "
        f"{', '.join(_TABLES + _FLOWS + _EDMS)}. Many convert: DDIMScheduler.from_config(scheduler.config)."
    )


def the_package() -> Any:
    """diffusers itself. Raises: MissingExtra."""
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise MissingExtra("Networks of diffusers need the package diffusers", "diffusion") from error
