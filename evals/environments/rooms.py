"""Rooms: a text game in which a policy walks to a goal and sees only names of rooms.

A grid of rooms whose names are permuted by a seed. The prompt names the goal and the start; the policy says N, E, S or
W, a word a turn, and the environment answers with the name of the room that it reached (walls: it stays). Nothing but
experience tells where a room lies, so that what a policy learns is a map. Context "privileged" adds the coordinates of
goal and start.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.policies.tasks import Task

if TYPE_CHECKING:
    from workbench.policies.lm.rollout import Rollout

MOVES = {"N": (0, -1), "E": (1, 0), "S": (0, 1), "W": (-1, 0)}


@dataclass(slots=True)
class Walk:
    """An episode: where the walker is, and what was said and answered so far."""

    goal: int
    at: int
    distance: int
    moves: int = 0
    is_confused: bool = False
    words: list[str] = field(default_factory=list)


class Rooms:
    """The game on one map.

    Args: size: rooms a side; seed: of the map.
    """

    max_turn_tokens = 1

    def __init__(self, size: int = 6, seed: int = 0, max_turns: int = 12) -> None:
        self.size, self.seed, self.max_turns = size, seed, max_turns
        names = list(range(size * size))
        random.Random(f"rooms/{seed}").shuffle(names)
        self._names = names  # cell -> name
        self._cells = {name: cell for cell, name in enumerate(names)}

    def words(self) -> list[str]:
        """Every word of the game, for a tokenizer."""
        return [*MOVES, *(f"r{name}" for name in range(self.size**2)), *(f"x{i}" for i in range(self.size)),
                *(f"y{i}" for i in range(self.size))]  # fmt: skip

    def tasks(self) -> list[Task]:
        """All pairs of goal and start, in an order that the seed decides."""
        rooms = range(self.size**2)
        pairs = [(goal, start) for goal in rooms for start in rooms if goal != start]
        random.Random(f"rooms/{self.seed}/tasks").shuffle(pairs)
        return [self._task(goal, start) for goal, start in pairs]

    def _task(self, goal: int, start: int) -> Task:
        (gx, gy), (sx, sy) = self._place(goal), self._place(start)
        prompts = {"prompt": f"r{goal} r{start}", "privileged": f"x{gx} y{gy} x{sx} y{sy} r{goal} r{start}"}
        return Task(f"rooms-{self.size}-{self.seed}-{goal}-{start}", prompts, meta={"goal": goal, "start": start})

    def _place(self, name: int) -> tuple[int, int]:
        y, x = divmod(self._cells[name], self.size)
        return x, y

    def distance(self, one: int, other: int) -> int:
        """Moves between two rooms."""
        (ax, ay), (bx, by) = self._place(one), self._place(other)
        return abs(ax - bx) + abs(ay - by)

    def moved(self, name: int, move: str) -> int:
        """The room that a move leads to; the same one at a wall."""
        (x, y), (dx, dy) = self._place(name), MOVES[move]
        x, y = min(max(x + dx, 0), self.size - 1), min(max(y + dy, 0), self.size - 1)
        return self._names[y * self.size + x]

    def best_moves(self, name: int, goal: int) -> list[str]:
        """The moves that bring the goal nearer."""
        now = self.distance(name, goal)
        return [move for move in MOVES if self.distance(self.moved(name, move), goal) < now]

    # -- the environment ---------------------------------------------------------------------------------------------

    def reset(self, task: Task) -> Walk:
        """A new episode of the task."""
        goal, start = task.meta["goal"], task.meta["start"]
        return Walk(goal, start, self.distance(goal, start))

    def step(self, state: Walk, said: str) -> tuple[str, bool]:
        """(the name of the room reached, whether it is the goal); what is no move ends the episode without success."""
        word = said.strip()
        state.moves += 1
        if word not in MOVES:
            state.is_confused = True
            return "", True
        state.at = self.moved(state.at, word)
        return f" r{state.at}", state.at == state.goal

    def reward(self, state: Walk) -> float:
        """1 if the goal was reached within 2 x distance + 2 moves."""
        return float(state.at == state.goal and not state.is_confused and state.moves <= 2 * state.distance + 2)

    # -- worked answers ----------------------------------------------------------------------------------------------

    def expert(self, task: Task, rng: random.Random, noise: float = 0.0) -> Iterator[tuple[str, str, str]]:
        """(best move, move made, answer) for every turn of a shortest walk; with `noise`, the share of random moves."""
        state: Any = self.reset(task)
        for _ in range(self.max_turns):
            best = rng.choice(self.best_moves(state.at, state.goal))
            made = rng.choice(list(MOVES)) if rng.random() < noise else best
            answer, is_over = self.step(state, made)
            yield best, made, answer
            if is_over:
                return

    def walks(
        self, tokenizer: Any, tasks: list[Task], rng: random.Random, noise: float = 0.0, each: int = 1
    ) -> dict[str, list[Rollout]]:
        """The expert's walks as rollouts: `each` for every task; a random move is context, never a target."""
        from workbench.policies.lm.episodes import encode  # brings torch, which the game itself does without
        from workbench.policies.lm.rollout import Rollout

        found: dict[str, list[Rollout]] = {}
        for task in tasks:
            prompt = encode(tokenizer, task.prompt("prompt"))
            for _ in range(each):
                rollout = Rollout(task.id, prompt, [], mask := [])
                for best, made, answer in self.expert(task, rng, noise):
                    said, heard = tokenizer.encode(made), tokenizer.encode(answer)
                    rollout.completion_ids += said + heard
                    mask += [int(best == made)] * len(said) + [0] * len(heard)
                if any(mask):
                    found.setdefault(task.id, []).append(rollout)
        return found
