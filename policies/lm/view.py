"""What a term sees of a micro-batch: token ids, weights, and the predictions of every role, made when asked for.

Shapes: B sequences, T completion tokens (padded on the right), V vocabulary, D hidden. A segment is one set of
sequences of the batch ("main", or "chosen" and "rejected", …), padded by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.kernels.divergences import IGNORED_LABEL, DivergenceSpec, TopK
from workbench.kernels.linear_divergence import LinearLogits, linear_divergence


class Head(NamedTuple):
    """What makes logits of hidden states: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Reader:
    """A role that can be asked: its module, the prompt that it reads, and how to call it.

    Args:
        model: without the wrapper of a distributed launch.
        run: calls a function of the model inside that wrapper.
        is_student: gradients flow.
    """

    model: nn.Module
    context: str
    run: Callable[..., Any]
    is_student: bool = False


class View:
    """One micro-batch.

    Args:
        inputs: "<segment>.<name>" -> tensor, as `rollout.collate` makes them.
        readers: role -> how to ask it; always with "student".
        totals: segment -> (sum of loss weights, sum of sequence weights) of the whole optimiser step over all
            processes, already divided by the number of processes, whose gradients are averaged.
        state: the phase's numbers.
        contexts: segment -> the prompt that the student reads there, where it is not "prompt".
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        readers: Mapping[str, Reader],
        totals: Mapping[str, tuple[Tensor, Tensor]],
        state: Mapping[str, float],
        contexts: Mapping[str, str] | None = None,
    ) -> None:
        self._inputs, self._readers, self._totals, self._contexts = inputs, readers, totals, contexts or {}
        self.state = state
        self.metrics: dict[str, list[Tensor]] = {}
        self._hidden: dict[tuple[str, str], Tensor] = {}

    def get(self, name: str, segment: str = "main") -> Tensor:
        """A tensor of the batch: completion_ids, completion_mask, loss_weights, top_ids, … [B, T, …]."""
        key = f"{segment}.{name}"
        if key not in self._inputs:
            raise InputError(f"The batch has no {key!r}; there are {', '.join(sorted(self._inputs))}.")
        return self._inputs[key]

    def model(self, role: str = "student") -> nn.Module:
        """The module of a role."""
        return self._reader(role).model

    def module(self, name: str) -> nn.Module:
        """One of the phase's own modules."""
        return self.model().workbench_modules[name]  # pyright: ignore

    def hidden(self, role: str = "student", segment: str = "main") -> Tensor:
        """Last hidden states that predict the completion tokens [B, T, D]; without gradient but for the student."""
        if (role, segment) not in self._hidden:
            reader = self._reader(role)
            context = self._contexts.get(segment, reader.context) if reader.is_student else reader.context
            ids, mask = self.get(f"{context}_ids", segment), self.get(f"{context}_mask", segment)
            ids = torch.cat([ids, self.get("completion_ids", segment)], dim=1)
            mask = torch.cat([mask, self.get("completion_mask", segment)], dim=1)
            keep = self.get("completion_ids", segment).shape[1]
            if reader.is_student:
                self._hidden[role, segment] = last_hidden(reader.model, ids, mask, keep)
            else:
                with torch.no_grad():
                    self._hidden[role, segment] = reader.run(last_hidden, reader.model, ids, mask, keep)
        return self._hidden[role, segment]

    def head(self, role: str = "student") -> Head:
        """What makes the role's logits; detached but for the student."""
        reader = self._reader(role)
        head = head_of(reader.model)
        if reader.is_student:
            return head
        return head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())

    def logits(self, role: str = "student", segment: str = "main") -> Tensor:
        """All logits [B, T, V] in float32 or wider. Holds a vocabulary a token: for what no kernel does."""
        rows = self._linear(role, segment).logits()
        return rows.unflatten(0, self.get("completion_ids", segment).shape)

    def _linear(self, role: str, segment: str) -> LinearLogits:
        head = self.head(role)
        return LinearLogits(self.hidden(role, segment).flatten(0, 1), head.weight, head.bias, head.scale, head.softcap)

    def logprobs(self, role: str = "student", segment: str = "main") -> Tensor:
        """Log-probability of each completion token, natural log [B, T]; 0 on padding."""
        ids, mask = self.get("completion_ids", segment), self.get("completion_mask", segment)
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL).flatten()
        spec = DivergenceSpec(terms=(), label_weight=1.0)
        found = linear_divergence(self._linear(role, segment), None, spec, labels_T=labels, reduction="none")
        return -found.loss.unflatten(0, ids.shape).to(torch.float32)

    def divergence(
        self, spec: DivergenceSpec, teacher: str | None = "teacher", segment: str = "main",
        token_weights_BT: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Share of this micro-batch in the weighted mean of a divergence over the optimiser step, in nats a token.

        Args:
            spec: what is computed; with a label weight, the labels are the completion's tokens.
            teacher: a role, "stored" for the top-k scores that came with the rollouts, None for labels alone.
            token_weights_BT: instead of `token_weights`, which sum to 1 over the step.
        """
        weights = self.token_weights(segment) if token_weights_BT is None else token_weights_BT
        target = None
        if teacher == "stored":
            if spec.temperature != 1:
                raise InputError(
                    f"Stored scores are at temperature 1; a divergence at {spec.temperature} needs a model."
                )
            target = TopK(self.get("top_ids", segment).flatten(0, 1), self.get("top_logprobs", segment).flatten(0, 1))
        elif teacher is not None:
            target = self._linear(teacher, segment)
        found = linear_divergence(
            self._linear("student", segment), target, spec, token_weights_T=weights.flatten(), reduction="sum",
            labels_T=self.get("completion_ids", segment).flatten() if spec.label_weight else None,
        )  # fmt: skip
        used = weights.flatten() != 0
        if bool(used.any()):
            self.log(f"{segment}/student_entropy", found.student_entropy_T[used].mean())
        return found.loss

    def mean(self, values_BT: Tensor, segment: str = "main") -> Tensor:
        """Share of this micro-batch in the weighted mean over all tokens of the optimiser step."""
        weights = self.get("loss_weights", segment)
        # where, because 0 * inf on a masked token is not a number
        return torch.where(weights != 0, values_BT * weights, 0.0).sum() / self._totals[segment][0]

    def token_weights(self, segment: str = "main") -> Tensor:
        """Loss weights [B, T] that sum to 1 over the optimiser step, for kernels that take the sum themselves."""
        return self.get("loss_weights", segment) / self._totals[segment][0]

    def weights_by_sequence(self, segment: str = "main") -> Tensor:
        """Weights [B, T] under which every sequence counts by its own weight, however long; they sum to 1 as well."""
        weights = self.get("loss_weights", segment)
        lengths = (weights != 0).sum(-1, keepdim=True).clamp(min=1)
        return weights / lengths / self._totals[segment][1]

    def sequence_sum(self, values_BT: Tensor, segment: str = "main") -> Tensor:
        """Sum over the tokens that the policy wrote [B], not weighted."""
        return torch.where(self.get("loss_weights", segment) != 0, values_BT, 0.0).sum(-1)

    def sequence_mean(self, values_B: Tensor, segment: str = "main") -> Tensor:
        """Share of this micro-batch in the weighted mean over all sequences of the optimiser step."""
        return (values_B * self.get("sequence_weights", segment)).sum() / self._totals[segment][1]

    def log(self, name: str, value: Tensor) -> None:
        """A number to average and show, detached."""
        self.metrics.setdefault(name, []).append(value.detach())

    def _reader(self, role: str) -> Reader:
        if role not in self._readers:
            raise InputError(f"There is no role {role!r} in this phase; there are {', '.join(self._readers)}.")
        return self._readers[role]


def last_hidden(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, keep: int) -> Tensor:
    """The hidden states that predict the last `keep` tokens [B, keep, D].

    Positions count from each sequence's first token, so that left padding changes nothing.
    """
    positions = (mask_BL.cumsum(-1) - 1).clamp(min=0)
    # The last token predicts nothing that we know.
    output = backbone(model)(
        input_ids=ids_BL[:, :-1], attention_mask=mask_BL[:, :-1], position_ids=positions[:, :-1], use_cache=False
    )
    return output.last_hidden_state[:, -keep:, :]


def backbone(model: Any) -> nn.Module:
    """The model without its head; adapters stay in place."""
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    return inner.base_model


def head_of(model: Any) -> Head:
    """The head of a causal language model, with the scale and the cap that its configuration names."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = next(
        (
            float(value)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        1.0,
    )
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return Head(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))
