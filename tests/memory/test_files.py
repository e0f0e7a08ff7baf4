"""Files from running text and from tool calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.memory.files import FileCollector, files_from_tool, paths_in_text


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("see `src/app.py` and ./lib/util.TS, then src/app.py again", ["src/app.py", "lib/util.TS"]),
        (r"open C:\Users\ann\proj\main.rs now", ["C:/Users/ann/proj/main.rs"]),
        ("at reader.go:41:7 and ~/notes/todo.md.", ["reader.go", "~/notes/todo.md"]),
        ("../up/one.json, .github/workflows/ci.yml", ["../up/one.json", ".github/workflows/ci.yml"]),
        ("a .env file and config/.env", [".env", "config/.env"]),
        ("app.test.tsx then types.d.ts", ["app.test.tsx", "types.d.ts"]),
        ("données/été.csv", ["données/été.csv"]),
        # False friends of the card's pattern.
        ("https://example.com/a/b.html and www.example.org/x.py and github.com/o/r/blob/main/z.go", []),
        ("v1.c, 1.2.h, v2.0.1.md, e.g. x.h", []),
        ("console.log, process.env, response.json() and items.map(f)", []),
        ("git@host.com:org/repo.sh", []),
        ("backup.json.gz.part and foo.pyc", []),
        ("*.go", []),
    ],
)
def test_paths_in_text(text: str, paths: list[str]) -> None:
    assert paths_in_text(text) == paths


@pytest.mark.parametrize(
    ("name", "arguments", "touches"),
    [
        ("Read", {"file_path": "/w/a.py", "limit": 5}, [("/w/a.py", "read")]),
        ("Edit", {"file_path": "LICENSE", "old_string": "a", "new_string": "b"}, [("LICENSE", "modified")]),
        ("MultiEdit", {"file_path": "a.py", "edits": []}, [("a.py", "modified")]),
        ("Write", {"file_path": "a.py", "content": "see b.py"}, [("a.py", "created")]),
        ("NotebookEdit", {"notebook_path": "n.ipynb"}, [("n.ipynb", "modified")]),
        ("Grep", {"pattern": "x", "path": "src/a.py"}, []),
        ("TodoWrite", {"todos": [{"file": "a.py"}]}, []),
        ("read_file", {"absolute_path": "/w/a.py"}, [("/w/a.py", "read")]),
        ("read_many_files", {"paths": ["a.py", "b.py"]}, [("a.py", "read"), ("b.py", "read")]),
        ("write_file", {"file_path": "a.py"}, [("a.py", "created")]),
        ("replace", {"file_path": "a.py"}, [("a.py", "modified")]),
        ("str_replace_editor", {"command": "view", "path": "/w/a.py"}, [("/w/a.py", "read")]),
        ("str_replace_editor", {"command": "create", "path": "/w/a.py"}, [("/w/a.py", "created")]),
        ("str_replace_based_edit_tool", {"command": "insert", "path": "a.py"}, [("a.py", "modified")]),
        ("open", {"path": "a.py", "line_number": "3"}, [("a.py", "read")]),
        ("create", {"filename": "a.py"}, [("a.py", "created")]),
        ("mystery", {"path": "a.py"}, [("a.py", "referenced")]),
        ("mystery", {"path": "somewhere"}, []),
        ("delete_file", {"path": "old.py"}, [("old.py", "deleted")]),
        (
            "apply_patch",
            "*** Begin Patch\n*** Add File: a.py\n+x\n*** Update File: b.py\n*** Move to: c.py\n*** Delete File: d.py",
            [("a.py", "created"), ("b.py", "modified"), ("c.py", "created"), ("d.py", "deleted")],
        ),
        (
            "shell",
            {"command": ["bash", "-lc", "apply_patch <<'EOF'\n*** Begin Patch\n*** Update File: b.py\nEOF"]},
            [("b.py", "modified")],
        ),
        (
            "Bash",
            {"command": "cd src && cat a.py | head -3 > out.txt; rm -f 'old one.py' b.py"},
            [("a.py", "read"), ("out.txt", "created"), ("b.py", "deleted")],
        ),
        (
            "exec_command",
            {"cmd": "sed -n '1,9p' a.md && sed -i s/x/y/ b.md"},
            [("a.md", "read"), ("b.md", "modified")],
        ),
        (
            "Bash",
            {"command": "cat > a.py <<'EOF'\nrm b.py\nEOF\ntouch c.py"},
            [("a.py", "created"), ("c.py", "created")],
        ),
        ("Bash", {"command": "git mv a.py b.py"}, [("a.py", "deleted"), ("b.py", "created")]),
        ("Bash", {"command": "echo 'unbalanced"}, []),
        ("Read", None, []),
        ("Read", {"file_path": 7}, []),
    ],
)
def test_files_from_tool(name: str, arguments: Any, touches: list[tuple[str, str]]) -> None:
    assert [(t.path, t.action) for t in files_from_tool(name, arguments)] == touches


def test_the_strongest_action_wins_and_mentions_of_known_files_are_dropped() -> None:
    collector = FileCollector()
    collector.add_tool("Read", {"file_path": "/w/src/a.py"})
    collector.add_tool("Write", {"file_path": "/w/src/a.py"})
    collector.add_tool("Read", {"file_path": "/w/src/a.py"})
    collector.add_tool("Write", {"file_path": "new.py"})
    collector.add_tool("Edit", {"file_path": "new.py"})
    collector.add_tool("Bash", {"command": "rm gone.py"})
    collector.add_text("changed src/a.py and a.py; other/a.py stays")
    assert [(t.path, t.action) for t in collector.files()] == [
        ("/w/src/a.py", "modified"),
        ("new.py", "created"),
        ("gone.py", "deleted"),
        ("other/a.py", "referenced"),
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["Bash", "Edit", "apply_patch", "str_replace_editor", "read_many_files", "x"])
KEYS = st.sampled_from(["command", "cmd", "file_path", "path", "paths", "input", "files"])


@given(NAMES, JSON | st.dictionaries(KEYS, JSON, max_size=4))
def test_any_arguments_are_survived(name: str, arguments: Any) -> None:
    assert all(t.path for t in files_from_tool(name, arguments))


@given(st.text(alphabet="ab./\\:~@ -_\npy", max_size=120))
def test_paths_are_normalised_and_distinct(text: str) -> None:
    paths = paths_in_text(text)
    assert len(paths) == len(set(paths))
    assert not any("\\" in p or p.startswith("./") or p.endswith("/") for p in paths)
