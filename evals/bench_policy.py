"""Policies that a bench can run: a model folder on this machine, or a model behind an OpenAI-compatible server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workbench.data.records import digest
from workbench.errors import InputError
from workbench.evals.bench_run import Policy
from workbench.policies.lm.endpoint import Endpoint
from workbench.policies.lm.episodes import Write, local_writer
from workbench.policies.lm.local_models import folder_version, load, load_tokenizer, stay_offline
from workbench.policies.lm.served import ServedModel

#: What beside weights decides how a model reads and writes: tokenizer, chat template, generation defaults.
_SMALL_FILES = (".json", ".jinja", ".model", ".txt")


def local_policy(folder: str | Path) -> Policy:
    """A model folder, on the GPU in bfloat16 where there is one, else on the CPU in float32.

    Raises: InputError as of `local_models.load`. A prompt that does not fit the model's positions raises when it is
        written for, so that the sample is a policy_error and not a completion of half a prompt.
    """
    stay_offline()
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the bench has its own
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    local = load(folder, dtype=dtype, device=device)
    positions = getattr(local.model.config, "max_position_embeddings", None)

    def writer(temperature: float, seed: int) -> Write:  # the seed is torch's, which the runner has set
        write = local_writer(local.model, local.tokenizer, temperature)

        def checked(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
            longest = max(map(len, prompts))
            if positions and longest + max_tokens > positions:
                raise InputError(
                    f"A prompt of {longest} tokens and {max_tokens} to write do not fit the model's {positions} "
                    "positions. Lower --max-tokens."
                )
            return write(prompts, max_tokens)

        return checked

    version = digest("local", local.version, _small_files(Path(folder).expanduser()), dtype, device)
    return Policy(str(folder), version, local.tokenizer, writer, folder_version(Path(folder).expanduser()))


def _small_files(folder: Path) -> str:
    parts: list[str] = []
    for path in sorted(path for path in folder.iterdir() if path.suffix in _SMALL_FILES):
        parts += [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
    return digest(*parts)


@contextmanager
def served_policy(model: str, base_url: str, tokenizer: str | Path, api_key_env: str | None = None) -> Iterator[Policy]:
    """A model behind a server that takes token ids, or at least text.

    A seed goes with every request, and whether it decides what is sampled is the server's matter: at a temperature
    above 0 only stored samples are surely the same again. Other weights under the same name are not noticed: name them
    anew.

    Args: tokenizer: the model's, a folder.
    Raises: InputError for a folder without tokenizer, EndpointError.
    """
    stay_offline()
    words = load_tokenizer(tokenizer)
    with _endpoint(base_url, model, api_key_env) as endpoint:
        served = ServedModel(endpoint, words)
        if not served.capabilities.accepts_ids:
            words.chat_template = None  # such a server gets text, and puts its own template around it

        def writer(temperature: float, seed: int) -> Write:
            seed %= 2**31  # some servers take no longer numbers
            ids = served.capabilities.accepts_ids
            return served.writer(temperature, seed) if ids else _by_text(served, temperature, seed)

        version = digest("served", base_url, model, _small_files(Path(tokenizer).expanduser()))
        yield Policy(f"{model}@{base_url}", version, words, writer)


def _by_text(served: ServedModel, temperature: float, seed: int) -> Write:
    def write(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        texts = [str(served.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in prompts]
        return [one.ids for one in served.write(texts, max_tokens, temperature, seed=seed)]

    return write


def _endpoint(base_url: str, model: str, api_key_env: str | None) -> Endpoint:
    key = api_key_env or ("OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else None)
    return Endpoint(base_url, model, api_key_env=key)
