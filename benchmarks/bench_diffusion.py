"""The diffusion methods on toys, each against its own baselines and with its own part switched off.

    python benchmarks/bench_diffusion.py FAMILY [--seeds 0 1 2] [--only CASE ...] [--out benchmarks/results]

A family is a file diffusion_cases_FAMILY.py beside this one with CASES: name -> (seed) -> rows (name, measures). Rows
of a case share teacher, data and start. Cases must not be compared with each other: the order of methods on a toy says
nothing about images.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
Rows = Iterable[tuple[str, dict[str, float]]]


def measured(case: Callable[[int], Rows], seeds: list[int]) -> dict[str, list[dict[str, float]]]:
    """Row -> its measures, one dictionary a seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for row, values in case(seed):
            found.setdefault(row, []).append(values)
    return found


def table_of(name: str, about: str, seconds: float, rows: dict[str, list[dict[str, float]]]) -> str:
    """A case as Markdown: mean and standard deviation over seeds."""
    columns = list(dict.fromkeys(column for values in rows.values() for one in values for column in one))
    lines = [f"## {name}", "", about, "", f"| run | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row, values in rows.items():
        lines.append(f"| {row.strip()} | {' | '.join(cell([v[c] for v in values if c in v]) for c in columns)} |")
    return "\n".join([*lines, "", f"{seconds:.0f} CPU s.", ""])


def cell(values: list[float]) -> str:
    """Mean ± standard deviation; "" of nothing."""
    if not values:
        return ""
    digits = 0 if mean(values) >= 100 else 1 if mean(values) >= 10 else 3
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    """Prints the tables; keeps the rows in results/diffusion_FAMILY.json by case, and writes the .md from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(path.stem[16:] for path in HERE.glob("diffusion_cases_*.py")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = import_module(f"diffusion_cases_{options.family}").CASES
    if unknown := set(options.only or ()) - set(cases):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    for name in options.only or cases:
        start = time.process_time()
        rows = measured(cases[name], options.seeds)
        about = f"{(cases[name].__doc__ or '').strip()} Seeds {', '.join(map(str, options.seeds))}; {date.today()}."
        found = {"about": about, "seconds": time.process_time() - start, "rows": rows}
        print(table_of(name, **found), flush=True)
        keep(options.out / f"diffusion_{options.family}.json", options.family, {name: found}, list(cases))


def keep(path: Path, family: str, found: dict[str, dict[str, Any]], order: list[str]) -> None:
    """Replaces cases in the file of results, and writes the Markdown beside it anew."""
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept = dict(sorted((kept | found).items(), key=lambda item: order.index(item[0])))
    path.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    head = f"# Diffusion methods: {family}\n\n`python benchmarks/bench_diffusion.py {family}` · {machine}; mean ± sd\n"
    tables = [table_of(name, **one) for name, one in kept.items()]
    path.with_suffix(".md").write_text("\n".join([head, *tables]), "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
