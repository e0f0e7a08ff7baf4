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
    """The whole main job in a process in which no heavy package can be found."""
    samples = ROOT / "data" / "samples" / "claude_code"
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import workbench
store = {str(tmp_path / "s.duckdb")!r}
assert workbench.ingest([{str(samples)!r}], store).exchanges_added > 0
assert workbench.distill(store).memories_added > 0
print(len(workbench.recall("rate limit", store, k=3)))
"""
    assert int(run(code)) > 0


def test_a_recall_does_without_masked_arrays(tmp_path: Path) -> None:
    """np.unique, and an array as a parameter of a statement, import numpy.ma: 6 ms of each `workbench recall`."""
    code = f"""
import workbench
workbench.ingest([{str(ROOT / "data" / "samples" / "claude_code")!r}], {str(tmp_path / "s.duckdb")!r})
workbench.distill({str(tmp_path / "s.duckdb")!r})
"""
    run(code)
    code = f"""
import sys, workbench
found = workbench.recall("rate limit database", {str(tmp_path / "s.duckdb")!r})
print(len(found) > 0, "numpy.ma" in sys.modules)
"""
    assert run(code) == "True False"


def test_transformers_and_trl_do_not_take_our_kernels_for_theirs() -> None:
    """From the repository root, where `kernels/` could shadow Hugging Face's package of that name."""
    pytest.importorskip("transformers", reason="the train extra is not installed")
    pytest.importorskip("trl", reason="the train extra is not installed")
    code = f"""
import importlib.metadata, sys
sys.path.insert(0, {str(ROOT)!r})
import transformers, trl
from transformers.utils import import_utils
installed = any(d.name == "kernels" for d in importlib.metadata.distributions())
assert import_utils.is_kernels_available() == installed
assert trl.SFTConfig
import workbench.kernels
print("ours:", [p for p in workbench.kernels.__path__])
"""
    assert "workbench" in run(code)


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    """Hugging Face's package stands behind the repository root on sys.path and must still be the one that is found."""
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("__version__ = '0.19.0'\n")
    code = f"""
import sys
sys.path = [{str(ROOT)!r}, {str(tmp_path)!r}, *sys.path]
import kernels, workbench.kernels
print(kernels.__file__)
"""
    assert run(code) == str(theirs)


def test_nothing_of_ours_is_importable_by_its_short_name(tmp_path: Path) -> None:
    """After installation (seen from another folder), `kernels`, `data` and the like are not ours."""
    code = f"""
import importlib.util
print([n for n in {ROOMS!r} if (s := importlib.util.find_spec(n)) and {str(ROOT)!r} in str(s.origin)])
"""
    assert run(code, cwd=tmp_path) == "[]"
