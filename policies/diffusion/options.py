"""Words that settings of methods choose among; in a module without torch, so that recipes are checked without it."""

from __future__ import annotations

from typing import Literal

#: A step of the probability-flow ODE: `samplers`.
Solver = Literal["euler", "heun", "ddim"]
#: Of stored pairs: `pools`.
Precision = Literal["float32", "float16"]
#: Between two predictions, how a derivative along the flow is taken, how a tangent is bounded: `consistency`.
Distance = Literal["l2", "huber"]
Derivative = Literal["jvp", "difference"]
Bound = Literal["norm", "clamp"]
