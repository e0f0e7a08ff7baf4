"""What a module inside a network puts out, by its path."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Self

from torch import Tensor, nn

from workbench.errors import InputError


class Taps:
    """Outputs of modules of `model` in its latest forward pass, while the context is open.

        with Taps(model, model.stages) as taps:
            logits = model(image)
            features = taps["body.0"]

    Hooks are registered on entering and released on leaving, also after an error. A module that runs several times in
    a pass leaves its last output. Outputs are not detached and not copied.

    Args: paths: as in `model.get_submodule`.
    Raises: InputError for a path that the model lacks, on reading one that has not run, or if it put out no tensor.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._modules: dict[str, nn.Module] = {}
        named = dict(model.named_modules())
        for path in paths:
            if path not in named or not path:
                near = get_close_matches(path, named, 3) or list(named)[1:4]
                raise InputError(
                    f"{type(model).__name__} has no module {path!r}; it has {', '.join(near)}, among others."
                )
            self._modules[path] = named[path]
        self._outputs: dict[str, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        if self._handles:
            raise InputError("These taps are open already; make others to read the model in another place.")
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keeper(path)))
        return self

    def _keeper(self, path: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[path] = output

        return keep

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._outputs:
            known = ", ".join(self._outputs) or "nothing"
            raise InputError(f"The tap {path!r} has no output: its module has not run; so far there is {known}.")
        output = self._outputs[path]
        if not isinstance(output, Tensor):
            raise InputError(f"The module {path!r} puts out {type(output).__name__}, not a tensor; tap one inside it.")
        return output

    def outputs(self) -> dict[str, Tensor]:
        """All of them, in the order of the paths; raises as reading one does."""
        return {path: self[path] for path in self._modules}
