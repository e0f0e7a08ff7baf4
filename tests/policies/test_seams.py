"""The places where the engine bends TRL: when TRL moves one of them, this fails and says which."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

import trl
from trl.trainer.distillation_trainer import DistillationTrainer

from workbench.policies.lm.engine import LmTrainer

#: Overridden method -> its parameters in TRL 1.16.
OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_train_sampler": ["self", "dataset"],
    "_save_checkpoint": ["self", "model", "trial"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
}
#: Called or read by us -> parameters.
USED = {
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
    "_prepare_inputs": ["self", "generation_batch"],
}
#: Who must still call what, in which file, for an override to have an effect.
CALLS = {
    "_prepare_inputs": ["self._generate_and_score_completions(", "shuffle_sequence_dict(", "split_tensor_dict("],
    "_generate_single_turn": ["self.generation_config", "unwrapped_model.generate("],
    "training_step": ["self._step += 1"],
    "__init__": ["self._forward_redirection", "self._metrics", "self.temperature = ", "set_seed(args.seed, device"],
}


def test_trl_is_the_pinned_version() -> None:
    assert trl.__version__.startswith("1.16."), "policies/lm/engine.py was written against TRL 1.16: read it again"


@pytest.mark.parametrize("name", [*OVERRIDDEN, *USED])
def test_signatures_are_those_that_the_engine_knows(name: str) -> None:
    found = list(inspect.signature(getattr(DistillationTrainer, name)).parameters)
    assert found == {**OVERRIDDEN, **USED}[name], f"TRL changed {name}: read its new source, then mend the engine"


@pytest.mark.parametrize("name", list(CALLS))
def test_the_calls_that_the_overrides_hang_on_are_there(name: str) -> None:
    source = inspect.getsource(getattr(DistillationTrainer, name))
    missing = [call for call in CALLS[name] if call not in source]
    assert not missing, f"TRL's {name} no longer has {missing}: the engine's override may have no effect"


def test_the_engine_overrides_nothing_else() -> None:
    """A new override is a new seam: it must be named in the engine's headnote and here."""
    ours = {name for name, value in vars(LmTrainer).items() if inspect.isfunction(value)}
    inherited = {name for name in ours if hasattr(DistillationTrainer, name)} - {"__init__", "train"}
    assert inherited == set(OVERRIDDEN)
