"""Fails where a file or function has grown past the house's limits. Run as a script by `make check`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
#: Flat by nature, with the reason.
ALLOWED: dict[str, str] = {"workbench/cli/distill_command.py:distill": "one option a line"}


def violations(path: Path) -> list[str]:
    """The limits that a Python file breaks, as messages."""
    text = path.read_text("utf-8")
    found = []
    if (lines := text.count("\n")) > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and f"{path}:{node.name}" not in ALLOWED:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return found


def main() -> int:
    """Checks every tracked Python file; returns the exit code."""
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout.split()
    found = [message for name in listed if not Path(name).is_symlink() for message in violations(Path(name))]
    print(
        "\n".join(found) or f"{len(listed)} files within {MAX_FILE_LINES} lines, functions within {MAX_FUNCTION_LINES}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
