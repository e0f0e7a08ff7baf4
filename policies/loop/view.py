"""What a term sees of a training step: the rows of its micro-batch, the roles, random draws, and how to take a mean.

Every draw is made for the rows of the whole optimiser step, from a generator whose seed is the run's, the step's and
the reader's; a micro-batch takes its rows of it. So accumulation, processes and a resumed run draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.nouns import Fresh, Mixed, Source, Stored

Table = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a micro-batch stands: `offset` and `size` are its rows among the `rows` of the step."""

    seed: int
    phase: str
    step: int
    steps: int
    rows: int
    offset: int
    size: int

    def generator(self, device: torch.device, *key: object) -> torch.Generator:
        """A generator for a reader of this step, the same on every process and micro-batch."""
        return torch.Generator(device).manual_seed(seed_of(self.seed, self.phase, self.step, *key))


class View:
    """One micro-batch in the turn of one role.

    Args: trains: the role whose turn it is; sources: of the phase; tables: stored rows by name; state: of the phase.
    """

    def __init__(
        self, place: Place, trains: str, roles: Mapping[str, nn.Module], modules: Mapping[str, nn.Module],
        sources: Mapping[str, Source], tables: Mapping[str, Table], state: dict[str, float], accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.place, self.trains, self.state = place, trains, state
        self.metrics: dict[str, float] = {}
        self._roles, self._modules, self._sources, self._tables = roles, modules, sources, tables
        self._accelerator = accelerator
        self._segments: dict[str, Table] = {}
        self._shared: dict[str, Any] = {}
        self._cuts: list[list[tuple[Tensor, Tensor]]] = []  # of each `shared`: what was made, and what terms got
        self._generator = place.generator(self.device, "terms", trains)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self._accelerator.device

    @property
    def size(self) -> int:
        """Rows of this micro-batch."""
        return self.place.size

    @property
    def step(self) -> int:
        """Number of the step in its phase, from 0."""
        return self.place.step

    @property
    def steps(self) -> int:
        """Steps of the phase."""
        return self.place.steps

    def role(self, name: str) -> nn.Module:
        """A role's module; of all parameters only those of `trains` require gradients."""
        return self._found(self._roles, name, "role")

    def module(self, name: str) -> nn.Module:
        """A module that the phase's `modules` made."""
        return self._found(self._modules, name, "module")

    def _found(self, among: Mapping[str, nn.Module], name: str, kind: str) -> nn.Module:
        if name not in among:
            known = ", ".join(among) or "none"
            raise InputError(f"Phase {self.place.phase!r} has no {kind} {name!r}; there are {known}.")
        return among[name]

    # -- rows --------------------------------------------------------------------------------------------------------

    def __getitem__(self, segment: str) -> Table:
        if segment not in self._segments:
            if segment not in self._sources:
                raise InputError(
                    f"Phase {self.place.phase!r} has no segment {segment!r}; has {', '.join(self._sources)}."
                )
            outer = self._generator  # a source's draws are the same in every turn, whatever the terms drew before
            self._generator = self.place.generator(self.device, "source", segment)
            try:
                self._segments[segment] = self._rows(segment, self._sources[segment])
            finally:
                self._generator = outer
        return self._segments[segment]

    def _rows(self, segment: str, source: Source) -> Table:
        if isinstance(source, Mixed):
            source = source.first if self.uniform() < source.fraction else source.second
        if isinstance(source, Stored):
            return self.stored(source.policy, segment)
        if isinstance(source, Fresh):
            raise InputError(f"Segment {segment!r}: here a source makes its batch itself; {source} belongs to `lm`.")
        return source(self)

    def stored(self, name: str, order: str = "") -> dict[str, Tensor]:
        """Rows of a table, each epoch in another order; "index" [B] are their numbers in the table.

        Args: order: readers of different names see the table in different orders.
        """
        if name not in self._tables:
            known = ", ".join(self._tables) or "none"
            raise InputError(f"Phase {self.place.phase!r} reads the table {name!r}; there are {known}.")
        table = self._tables[name]
        num = len(next(iter(table.values())))
        first = self.place.step * self.place.rows + self.place.offset
        numbers = torch.arange(first, first + self.size)
        index = torch.empty_like(numbers)
        for epoch in torch.unique(numbers // num).tolist():
            here = numbers // num == epoch
            shuffled = _order(num, seed_of(self.place.seed, self.place.phase, name, order, epoch))
            index[here] = shuffled[numbers[here] % num]
        rows = {key: value[index.to(value.device)].to(self.device) for key, value in table.items()}
        return rows | {"index": index.to(self.device)}

    def epoch(self, name: str) -> int:
        """How many times the table was gone through before this step's first row."""
        return self.place.step * self.place.rows // len(next(iter(self._tables[name].values())))

    # -- draws -------------------------------------------------------------------------------------------------------

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn[self.place.offset : self.place.offset + self.size]

    def rand(self) -> Tensor:
        """[B] uniform in [0, 1)."""
        return self._own(torch.rand(self.place.rows, generator=self._generator, device=self.device))

    def randn(self, *shape: int) -> Tensor:
        """[B, *shape] standard normal."""
        return self._own(torch.randn(self.place.rows, *shape, generator=self._generator, device=self.device))

    def randn_like(self, rows: Tensor) -> Tensor:
        """Standard normal numbers in the shape of a micro-batch's tensor [B, …]."""
        return self.randn(*rows.shape[1:]).to(rows.dtype)

    def randint(self, high: int) -> Tensor:
        """[B] long, uniform in [0, high)."""
        return self._own(torch.randint(high, (self.place.rows,), generator=self._generator, device=self.device))

    def uniform(self) -> float:
        """One number for the whole step, uniform in [0, 1)."""
        return float(torch.rand((), generator=self._generator, device=self.device))

    # -- means -------------------------------------------------------------------------------------------------------

    def mean(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in the mean over the step's rows: of a loss for each row, [B] -> scalar."""
        if values.shape != (self.size,):
            raise InputError(
                f"A mean over the step's rows takes one number for each, [{self.size}], not {[*values.shape]}."
            )
        return values.sum() / self.place.rows

    def average(self, value: Tensor) -> Tensor:
        """Mean of a tensor over processes, without gradient; micro-batches stay apart."""
        return cast(Tensor, self._accelerator.reduce(value.detach().clone(), "mean"))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, [B x processes, …], without gradient, in the order of the step."""
        return cast(Tensor, self._accelerator.gather(rows.detach()))

    def log(self, name: str, value: float) -> None:
        """A number for the run's metrics."""
        self.metrics[name] = float(value)

    # -- what terms share ----------------------------------------------------------------------------------------------

    def shared(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives (a tensor, or a dict, list or tuple of them), made once a turn for all terms.

        Each term has a backward pass of its own, so that only one graph is held at a time. What they share is cut out
        of their graphs: its gradients are collected, and flow on when all terms are done (`flow_back`).
        """
        if key not in self._shared:
            made, cut = make(), []
            self._shared[key] = _cut(made, cut)
            self._cuts.append(cut)
        return self._shared[key]

    def flow_back(self) -> None:
        """Sends the collected gradients on, the last made first: a shared thing may have been made from another."""
        while self._cuts:
            reached = [(value, leaf.grad) for value, leaf in self._cuts.pop() if leaf.grad is not None]
            if reached:
                torch.autograd.backward([value for value, _ in reached], [grad for _, grad in reached])


def _cut(value: Any, cut: list[tuple[Tensor, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        cut.append((value, value.detach().requires_grad_()))
        return cut[-1][1]
    if isinstance(value, Mapping):
        return {key: _cut(one, cut) for key, one in value.items()}
    return type(value)(_cut(one, cut) for one in value)


def seed_of(*key: object) -> int:
    """A seed for a generator from what it is for."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:7], "big")


@lru_cache(maxsize=8)
def _order(num: int, seed: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))
