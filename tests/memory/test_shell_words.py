"""The splitter agrees with shlex on any line, and the pre-check of `files` spares no line that names a file."""

from __future__ import annotations

import shlex

from hypothesis import example, given
from hypothesis import strategies as st

from workbench.memory import files
from workbench.memory.shell_words import split_words

PIECES = [
    "cat", "'c'at", "rm", "r\\m", "sed -i", "git mv", "cp", "tee", "touch", "head -20", "echo", "x=1",
    "category", "my_cat", "/bin/cat", " ", "  ", "	", "'", "\"", "\\", "#", ";", "&&", "||", "|", "&", "(",
    ")", ">", ">>", "2>&1", "<", "<<", "a.py", "src/b.ts", "'c d.md'", "\"e\\\"f.go\"", "Makefile",
    "Make'file'", ".env", "g\\.rs", "$HOME", "é.txt", "1.5", "-",
]  # fmt: skip
LINES = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join) | st.text(max_size=30)


def by_shlex(line: str) -> list[str] | None:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    try:
        return list(lexer)
    except ValueError:
        return None


def by_us(line: str) -> list[str] | None:
    try:
        return split_words(line)
    except ValueError:
        return None


@given(LINES)
@example("a'b\\'c")
@example('\'\'|"\\a\\"\\\\"')
@example("x\\")
@example("a#b c")
def test_words_are_those_of_shlex(line: str) -> None:
    line = "".join(line.splitlines())  # `files` reads line by line
    assert by_us(line) == by_shlex(line)


@given(LINES)
@example("c'a't Makefil\\e")
@example("echo x>>'a'.py")
def test_no_line_that_names_a_file_is_spared(line: str) -> None:
    line = "".join(line.splitlines())
    expected, simple = [], []
    for word in [*(by_shlex(line) or []), ";"] if "<<" not in line else []:
        if word in files._SEPARATORS:
            expected += files._from_simple_command(simple)
            simple = []
        else:
            simple.append(word)
    if "<<" not in line:  # heredocs are cut out first
        assert list(files._from_shell(line)) == expected
