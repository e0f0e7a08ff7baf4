"""Models of this machine: loaded from folders of safetensors without a network, or made; known by their contents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.data.records import digest
from workbench.errors import InputError
from workbench.policies.lm.tiny import make_model, make_tokenizer
from workbench.policies.versions import folder_version, weights_version

if TYPE_CHECKING:
    from workbench.policies.lm.rollout import Rollout
    from workbench.policies.lm.scoring import Scorer
    from workbench.policies.tasks import Environment, Task


@dataclass(frozen=True)
class LocalModel:
    """A model with its tokenizer; its weights are read when `model` is first asked for.

    Args: read: gives the model; version: digest of its weights, and their dtype where it is not float32; tokens: digest
        of its vocabulary; source: what people call it.
    """

    read: Callable[[], Any]
    tokenizer: Any
    version: str
    tokens: str
    source: str

    @cached_property
    def model(self) -> Any:
        """The model; raises InputError if it cannot be read."""
        return self.read()

    def roll_out(
        self, tasks: Sequence[Task], *, context: str, max_tokens: int, temperature: float, seed: int,
        environment: Environment | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """One rollout of each task, in order; the same seed gives the same.

        Args: context: which of the tasks' prompts is read; environment: answers after each turn.
        """
        import torch

        from workbench.policies.lm.episodes import encode, local_writer, roll_out

        prompts = [encode(self.tokenizer, task.prompt(context)) for task in tasks]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            write = local_writer(self.model, self.tokenizer, temperature)
            return roll_out(write, self.tokenizer, tasks, prompts, max_tokens, environment)

    def scorer(self) -> Scorer:
        """Who gives the model's top-k of given completions."""
        from workbench.policies.lm.scoring import LocalTeacher

        return LocalTeacher(self.model, self.version)


def stay_offline() -> None:
    """Nothing is downloaded or reported. Before transformers and trl are imported: both look only once."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")


def load(folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> LocalModel:
    """A causal language model and its tokenizer; code that a folder brings is never run.

    Args: dtype: a name of torch's, of the weights in memory.

    Raises: InputError if the folder lacks the configuration, the safetensors or the tokenizer.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json. Models are never downloaded here.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no *.safetensors. Other formats can run code when they are read: convert the model with "
            "save_pretrained() where it is trusted."
        )
    tokenizer, version = load_tokenizer(folder), folder_version(folder)
    return LocalModel(
        lambda: _read(folder, dtype, device), tokenizer, version if dtype == "float32" else f"{version}, {dtype}",
        vocabulary_version(tokenizer), str(folder),
    )  # fmt: skip


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder; raises InputError if there is none."""
    from transformers import AutoTokenizer

    place = Path(folder).expanduser()
    if not place.is_dir():  # transformers would take it for a name on a hub, and look into its cache
        raise InputError(f"There is no tokenizer in {folder}: it is no folder.")
    try:
        return AutoTokenizer.from_pretrained(place, padding_side="left", **_SAFE)
    except (OSError, ValueError) as error:
        raise InputError(f"There is no tokenizer in {folder}: {' '.join(str(error).split())[:400]}") from error


_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _read(folder: Path, dtype: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype, **_SAFE)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return _with_our_attention(model).to(device)


def _with_our_attention(model: Any) -> Any:
    """The model with workbench.kernels.attention, where its class takes attention from outside; else with its own."""
    from workbench.kernels import attention_transformers

    if model._supports_attention_backend:
        attention_transformers.register()
        model.set_attn_implementation(attention_transformers.NAME)
    return model


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError(f"The model in {folder} cannot be loaded: {' '.join(str(error).split())[:400]}")


def make(words: Sequence[str], *, hidden: int, layers: int, seed: int, device: str = "cpu") -> LocalModel:
    """A tiny Llama with random weights over a closed list of words."""
    tokenizer = make_tokenizer(words)
    model = _with_our_attention(make_model(tokenizer, seed, hidden, layers))
    source = f"new (hidden {hidden}, layers {layers}, seed {seed})"
    model = model.to(device)
    return LocalModel(lambda: model, tokenizer, weights_version(model), vocabulary_version(tokenizer), source)


def vocabulary_version(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary: token strings and their ids."""
    return digest("vocabulary", json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False))
