"""The modules behind a phase's roles: given, copied, averaged, or adapters on weights that another role holds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.nouns import Phase, Role


class Adapted(nn.Module):
    """A network seen through its low-rank adapters, which are switched on for the call only.

    The base is not a submodule: its weights belong to the role that holds it. Attributes of the base can be read here.
    """

    def __init__(self, base: nn.Module, name: str, rank: int) -> None:
        super().__init__()
        self.__dict__["base"] = base
        self.adapter = name
        layers = [path for path, layer in base.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        if not layers:
            raise InputError(f"Role {name!r}: the module it adapts has no linear or convolutional layer.")
        targets = sorted({path.removesuffix(".base_layer") for path in layers if ".lora_" not in f".{path}"})
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`", category=UserWarning)  # is meant
            inject_adapter_in_model(config, base, adapter_name=name)
        self.weights = nn.ParameterDict()
        for path, layer in base.named_modules():
            if isinstance(layer, BaseTunerLayer):
                for matrix in ("lora_A", "lora_B"):
                    self.weights[f"{path}.{matrix}".replace(".", "/")] = getattr(layer, matrix)[name].weight
        _switch(base, None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, with the adapters."""
        with self.switched_on():
            return self.base(*args, **kwargs)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """While open, the base answers with the adapters."""
        _switch(self.base, self.adapter)
        try:
            yield
        finally:
            _switch(self.base, None)


def _switch(base: nn.Module, adapter: str | None) -> None:
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = adapter is None  # set_adapter and enable_adapters would also change requires_grad
            layer._active_adapter = [adapter] if adapter else []


def make_roles(
    phase: Phase, student: nn.Module | None, models: Mapping[str, nn.Module], device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Every role's module by name, "student" included, and the phase's further modules.

    Args: student: None where the phase's student is an adapter.

    Raises: InputError for a model that is missing, a role that cannot train, and modules that belong to nobody.
    """
    roles = {} if student is None else {"student": student.to(device)}
    for role in phase.roles:
        if role.origin != "new":
            roles[role.name] = _role(role, roles, models, phase.name).to(device)
    if "student" not in roles:
        raise InputError(f"Phase {phase.name!r} has no student: none was given, and none of its roles is one.")
    made = dict(phase.modules(roles)) if phase.modules else {}
    for role in phase.roles:
        if role.origin == "new":
            if role.name not in made:
                raise InputError(
                    f"Phase {phase.name!r}: `modules` makes no {role.name!r}; made were {', '.join(made)}."
                )
            roles[role.name] = made.pop(role.name).to(device)
    for name in made:
        if owner(name) not in {"student", *phase.role_terms}:
            raise InputError(f"Phase {phase.name!r}: the module {name!r} belongs to no role that trains.")
    for name in ("student", *phase.role_terms):
        if not any(p.requires_grad for p in roles[name].parameters()):  # modules of its own do not make up for it
            raise InputError(
                f"Phase {phase.name!r}: the role {name!r} shall train and has no parameter that requires a gradient (a "
                "copy of a frozen model, or a model without parameters?). It would stay as it is, silently."
            )
    return roles, {name: module.to(device) for name, module in made.items()}


def owner(module: str) -> str:
    """The role that trains a module: "critic" of "critic.head", the student of a plain name."""
    return module.rsplit(".", 1)[0] if "." in module else "student"


def _role(role: Role, roles: Mapping[str, nn.Module], models: Mapping[str, nn.Module], phase: str) -> nn.Module:
    if role.origin == "given":
        if role.name not in models:
            raise InputError(
                f"Phase {phase!r} needs a model for the role {role.name!r}; given were {', '.join(models) or 'none'}."
            )
        return models[role.name].requires_grad_(False).eval()
    if role.origin == "live":
        return roles["student"]  # terms read it without gradient
    if role.origin in ("snapshot", "ema"):
        return frozen_copy(roles["student"])
    if role.of not in roles:
        raise InputError(
            f"Phase {phase!r}: {role.name!r} is a {role.origin} of {role.of!r}, which is no role before it."
        )
    if role.origin == "adapter":
        if any(parameter.requires_grad for parameter in roles[role.of].parameters()):
            raise InputError(
                f"Phase {phase!r}: {role.name!r} adapts {role.of!r}, which trains itself. Adapt a frozen role."
            )
        return Adapted(roles[role.of], role.name, role.rank)
    copied = copy.deepcopy(roles[role.of])
    for parameter in copied.parameters():  # a copy of a frozen model would train nothing, and nobody would notice
        parameter.requires_grad_(parameter.is_floating_point())
    return copied.train()


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that only answers."""
    return copy.deepcopy(module).requires_grad_(False).eval()


def average_into(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target = decay * target + (1 - decay) * source, for parameters; buffers are copied."""
    latest = dict(source.named_parameters())
    with torch.no_grad():
        for name, averaged in target.named_parameters():
            averaged.lerp_(latest[name].detach().to(averaged.dtype), 1 - decay)
        buffers: dict[str, Tensor] = dict(source.named_buffers())
        for name, buffer in target.named_buffers():
            buffer.copy_(buffers[name])
