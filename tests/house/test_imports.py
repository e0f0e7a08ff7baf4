"""The house: one import root, a light path without torch, and a `kernels` folder that nobody takes for another's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data", "memory", "evals", "policies", "kernels")
HEAVY = ("torch", "transformers", "trl", "sentence_transformers", "datasets", "scipy", "pandas")


def run(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_relative_links_into_the_package(room: str) -> None:
    link = ROOT / "workbench" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    assert run(f"import workbench.{room} as m; print(m.__name__)") == f"workbench.{room}"


@pytest.mark.parametrize(
    "module",
    [
        "workbench", "workbench.api", "workbench.cli.app", "workbench.cli.log_commands",
        "workbench.cli.memory_commands", "workbench.data.ingest", "workbench.memory.recall",
        "workbench.memory.distillers.extractive", "workbench.memory.index", "workbench.demo",
    ],
)  # fmt: skip
def test_light_path_imports_nothing_heavy(module: str) -> None:
    assert run(f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])") == "[]"


def test_light_path_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    """The whole main job in a process in which every heavy package is missing."""
    samples = ROOT / "data" / "samples" / "claude_code"
    code = f"""
import sys
for name in {HEAVY!r}: sys.modules[name] = None
import workbench
store = {str(tmp_path / "s.duckdb")!r}
assert workbench.ingest([{str(samples)!r}], store).exchanges_added > 0
assert workbench.distill(store).memories_added > 0
print(len(workbench.recall("rate limit", store, k=3)))
"""
    assert int(run(code)) > 0


def test_transformers_and_trl_do_not_take_our_kernels_for_theirs() -> None:
    """From the repository root, where `kernels/` could shadow Hugging Face's package of that name."""
    pytest.importorskip("transformers", reason="the train extra is not installed")
    pytest.importorskip("trl", reason="the train extra is not installed")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import transformers, trl
from transformers.integrations import hub_kernels
from transformers.utils import import_utils
taken = sys.modules.get("kernels")
assert taken is None or not str(taken.__file__).startswith({str(ROOT)!r}), taken
assert not getattr(hub_kernels, "_kernels_available", False) or taken is not None
print(import_utils.is_kernels_available())
"""
    import importlib.metadata

    installed = any(d.name == "kernels" for d in importlib.metadata.distributions())
    assert run(code) == str(installed)


def test_nothing_of_ours_is_importable_by_its_short_name(tmp_path: Path) -> None:
    """After installation (seen from another folder), `kernels`, `data` and the like are not ours."""
    code = f"""
import importlib.util
print([n for n in {ROOMS!r} if (s := importlib.util.find_spec(n)) and {str(ROOT)!r} in str(s.origin)])
"""
    assert run(code, cwd=tmp_path) == "[]"
