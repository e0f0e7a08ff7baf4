"""lm-evaluation-harness tasks on a model of this machine.

Only tasks in folders that are named are found: the harness's own 14,000 would take a minute to index and fetch their
data from the network (evals.md P17). Its request cache is never used: it does not know the weights (P1). Settings of
generation that are not carried out are refused, and so are prompts in which a template was left unrendered (P2).

Verified by: tests/evals/test_lm_eval_adapter.py, where lm-eval is installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import InputError, MissingExtra
from workbench.policies.lm.episodes import generate
from workbench.policies.lm.local_models import LocalModel, stay_offline

stay_offline()
try:
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise MissingExtra(f"Tasks of the lm-evaluation-harness need lm-eval ({error})", "evals") from error

_DONE_HERE = {"until", "max_gen_toks", "do_sample", "temperature"}
#: A context, a continuation and the texts that they came from, as the harness hands them over.
_Request = tuple[tuple[str, str], list[int], list[int]]


def run(local: LocalModel, tasks: Sequence[str], folder: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Results of the harness, by task.

    Args: tasks: names of tasks in YAML files under `folder`; limit: only the first so many items of each.
    Raises: InputError for an unknown task, for settings that are not carried out, and for unrendered templates.
    """
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise InputError(f"No task {unknown[0]!r} in {folder}; there are {', '.join(manager.all_tasks) or 'none'}.")
    found = lm_eval.simple_evaluate(
        LocalLM(local), tasks=list(tasks), task_manager=manager, limit=limit, use_cache=None, log_samples=True
    )
    for name, samples in found["samples"].items():
        for sample in samples:
            if unrendered := [text for text in _texts(sample["arguments"]) if "{{" in text and "}}" in text]:
                raise InputError(
                    f"Task {name}: a template was left unrendered ({unrendered[0][:80]!r}), so that its score means "
                    "nothing. Write doc_to_choice as one string, not as a list."
                )
    return found["results"]


def _texts(arguments: Any) -> list[str]:
    if isinstance(arguments, str):
        return [arguments]
    if isinstance(arguments, Mapping):
        arguments = arguments.values()
    inside = () if isinstance(arguments, int | float | bool | None) else arguments
    return [text for part in inside for text in _texts(part)]


class LocalLM(TemplateLM):
    """The harness's view of a local model.

    Args: batch_size: sequences in one forward pass.
    """

    def __init__(self, local: LocalModel, batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = local.model.eval(), local.tokenizer, batch_size
        self.max_length = int(getattr(self.model.config, "max_position_embeddings", 2**30))

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token; also what stands before a text that has no context."""
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **options)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the tokenizer's template writes them."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch_size):
            found += self._score([(c, e) for _, c, e in requests[start : start + self.batch_size]])
        return found

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding writes it) of each continuation after its context."""
        import torch

        rows = [context + continuation for context, continuation in pairs]
        width = max(map(len, rows))
        if width > self.max_length:
            raise InputError(f"A text of {width} tokens does not fit the model's {self.max_length} positions.")
        ids = torch.tensor([row + [self.eot_token_id] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        with torch.no_grad():
            logprobs_BTV = self.model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        found = []
        for at, (context, continuation) in enumerate(pairs):
            each_TV = logprobs_BTV[at, len(context) - 1 : len(context) + len(continuation) - 1]
            wanted = torch.tensor(continuation, dtype=torch.long, device=each_TV.device)
            total = each_TV.gather(1, wanted[:, None]).sum().item()
            found.append((float(total), bool((each_TV.argmax(-1) == wanted).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's length where they are longer."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.eot_token_id,
                max_seq_len=self.max_length - 1, context_len=1,
            )  # fmt: skip
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes, cut before the first of the stop strings.

        Raises: InputError for settings other than until, max_gen_toks, do_sample and temperature.
        """
        groups: dict[tuple[int, float], list[int]] = defaultdict(list)
        for at, request in enumerate(requests):
            settings = request.args[1]
            if other := sorted(settings.keys() - _DONE_HERE):
                raise InputError(f"Generation with {other[0]}={settings[other[0]]!r} is not carried out here.")
            temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
            if settings.get("do_sample") and not temperature:
                raise InputError("do_sample needs a temperature above 0.")
            groups[int(settings.get("max_gen_toks", 256)), temperature].append(at)
        found = [""] * len(requests)
        for (max_tokens, temperature), members in groups.items():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                prompts = [self.tok_encode(requests[at].args[0]) for at in batch]
                if (longest := max(map(len, prompts)) + max_tokens) > self.max_length:
                    raise InputError(
                        f"A prompt with {max_tokens} tokens to write takes {longest} positions, and the model has "
                        f"{self.max_length}. Lower max_gen_toks in the task's generation_kwargs."
                    )
                written = generate(self.model, self.tokenizer, prompts, max_tokens, temperature)
                for at, ids in zip(batch, written, strict=True):
                    text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                    found[at] = _cut(text, requests[at].args[1].get("until") or ())
        return found


def _cut(text: str, until: str | Sequence[str]) -> str:
    stops = [until] if isinstance(until, str) else until
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]
