"""Which files an exchange touched: exact paths and actions from tool calls, paths named in the text besides (card 001).

Deviations from the card's pattern: the scan is linear in the text; addresses, version strings, attribute access
(`console.log`, `response.json()`) and one-letter examples ("x.h") are no files; a trailing line number is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from workbench.memory.shell_words import split_words
from workbench.memory.types import FileTouch

Action = Literal["read", "modified", "created", "deleted", "referenced"]

MAX_PATH_CHARS = 300
MAX_COMMAND_CHARS = 20_000  # of a shell command that are looked at

_EXTENSION_NAMES = """
py pyi js mjs cjs ts tsx jsx json jsonl toml yaml yml md mdx rst html css scss sql sh bash zsh fish ps1 bat cfg ini
txt xml csv tsv parquet lock env dockerfile rs go java c h cc cpp hpp cs rb php swift kt scala ex exs erl hs ml r
jl lua dart zig nix vue svelte astro prisma graphql proto tf conf log pid sock wasm map ipynb gradle mod sum png
jpg svg pdf gz zip
"""
_EXTENSIONS = sorted(_EXTENSION_NAMES.split(), key=len, reverse=True)
_EXTENSION = re.compile(rf"\.(?:{'|'.join(_EXTENSIONS)})(?![\w(])(?!\.\w)", re.IGNORECASE)
_NAMES = frozenset({"Makefile", "Dockerfile", "LICENSE", "Gemfile", "Rakefile", "Procfile", "Justfile",
                    ".env", ".gitignore", ".gitattributes", ".dockerignore", ".editorconfig"})  # fmt: skip
_PATH_CHARS = frozenset("./\\~:@+-_")
_HOST = re.compile(r"(?:www\.|[\w.-]+\.(?:com|org|net|io|dev|ai|app|co|edu|gov)(?:[:/]|$))", re.IGNORECASE)
_VERSION = re.compile(r"v?\d+(?:\.\d+)*", re.IGNORECASE)
# Objects whose attributes look like files: console.log, process.env, response.json, array.map.
_OBJECT_NAMES = """console process math self this res resp response req request np numpy torch window document logger
log math.log os sys app cls obj arr array items list data result import.meta meta body e.g i.e"""
_OBJECTS = frozenset(_OBJECT_NAMES.split())
_ATTRIBUTES = frozenset({"log", "env", "map", "json", "lock", "conf", "html", "xml", "sum", "mod", "r", "c", "h", "ex"})


def paths_in_text(text: str) -> list[str]:
    """Paths named in running text, in order, each once; ~60 known extensions decide what a path is."""
    found: dict[str, None] = {}
    for match in _EXTENSION.finditer(text):
        start = match.start()
        limit = start - MAX_PATH_CHARS
        while start > max(0, limit) and (text[start - 1].isalnum() or text[start - 1] in _PATH_CHARS):
            start -= 1
        if start == limit:
            continue  # too long a run for a path
        path = _plausible(text[start : match.start()], match.group()[1:])
        if path:
            found[path] = None
    return list(found)


def _plausible(stem: str, extension: str) -> str | None:
    """The normalised path, or None where this is no file."""
    if "://" in stem or "@" in stem or stem.startswith("//"):
        return None
    drive = stem[:2] if len(stem) > 2 and stem[0].isalpha() and stem[1:3] in (":\\", ":/") else ""
    stem = stem[len(drive) :].rpartition(":")[2]
    if _HOST.match(stem.lstrip(".-")):
        return None
    path = normalise(f"{drive}{stem}.{extension}")
    directory, _, name = path.rpartition("/")
    name = name[: -len(extension) - 1]
    if not name.strip(".-"):
        return path if path in _NAMES or (directory and f".{extension}" in _NAMES) else None
    if not directory and (
        (_VERSION.fullmatch(name) and ("." in name or name[0] in "vV" or len(extension) == 1))
        or (len(name) == 1 and len(extension) == 1)
        or (extension in _ATTRIBUTES and name.lower() in _OBJECTS)
    ):
        return None
    return path


def normalise(path: str) -> str:
    """Forward slashes, no leading "./"."""
    path = path.strip().replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return path.lstrip("-")


_RANK = {"referenced": 0, "read": 1, "modified": 2, "created": 3, "deleted": 3}


class FileCollector:
    """Merges what the tool calls and the text of one exchange say about files; the strongest action wins."""

    def __init__(self) -> None:
        self._actions: dict[str, Action] = {}
        self._mentioned: dict[str, None] = {}

    def add_tool(self, name: str, arguments: Any) -> None:
        """Adds the files of one tool call; `arguments` as the log has them (object, string or None)."""
        for touch in files_from_tool(name, arguments):
            before = self._actions.get(touch.path)
            # A write to a file that was read or edited before replaces it.
            known = before in ("read", "modified") and touch.action == "created"
            action: Action = "modified" if known else touch.action
            if before is None or _RANK[action] >= _RANK[before]:
                self._actions[touch.path] = action

    def add_text(self, text: str) -> None:
        """Adds the files that a text names."""
        self.add_mentioned(paths_in_text(text))

    def add_mentioned(self, paths: list[str]) -> None:
        """Adds the files that a text names, which are known already."""
        self._mentioned.update(dict.fromkeys(paths))

    def files(self) -> list[FileTouch]:
        """Files of tool calls first, then those only mentioned; a mention that ends a known path is that path."""
        touches = [FileTouch(path, action) for path, action in self._actions.items()]
        endings: set[str] = set()
        for path in self._actions:
            parts = path.split("/")
            endings.update("/".join(parts[i:]) for i in range(len(parts)))
        touches += [FileTouch(path) for path in self._mentioned if path not in endings]
        return touches


_SHELLS = re.compile(r"^(?:bash|shell|sh|zsh|terminal|exec|exec_command|execute_bash|local_shell|local_shell_call|"
                     r"run_shell_command|run_command|execute_command|run_terminal_cmd|shell_command|container\.exec|"
                     r"cmdrunaction|powershell)$", re.IGNORECASE)  # fmt: skip
_NO_FILES = re.compile(r"grep|glob|list|search|find|^ls$|dir|task|todo|fetch|web", re.IGNORECASE)
_PATH_KEYS = ("file_path", "path", "absolute_path", "notebook_path", "filename", "file_name", "filepath", "file",
              "target_file", "relative_path")  # fmt: skip
_VERBS: tuple[tuple[re.Pattern[str], Action], ...] = (
    (re.compile(r"delete|remove|unlink", re.IGNORECASE), "deleted"),
    (re.compile(r"multi_?edit|edit|replace|patch|update|insert|modify|append|undo", re.IGNORECASE), "modified"),
    (re.compile(r"write|create|new_file|save|touch", re.IGNORECASE), "created"),
    (re.compile(r"read|view|open|cat|goto|scroll", re.IGNORECASE), "read"),
)
# str_replace_editor and its kin say in `command` what they do.
_EDITOR_COMMANDS: dict[str, Action] = {
    "view": "read", "create": "created", "str_replace": "modified", "insert": "modified", "undo_edit": "modified",
}  # fmt: skip
_PATCH_HEADER = re.compile(r"^\*\*\* (Add|Update|Delete) File: (.+)$|^\*\*\* (Move) to: (.+)$", re.MULTILINE)
_PATCH_ACTIONS: dict[str, Action] = {"Add": "created", "Update": "modified", "Delete": "deleted", "Move": "created"}
_DIFF_HEADER = re.compile(r"^\+\+\+ (?:b/)?(\S+)", re.MULTILINE)


def files_from_tool(name: str, arguments: Any) -> list[FileTouch]:
    """The files that one tool call touches, with what it does to them; [] where that cannot be told.

    Knows Claude Code, Codex CLI (apply_patch included), Gemini CLI, SWE-agent and OpenHands; any other tool by the
    verb in its name and its `path`-like argument; shell commands where reading, writing or deleting is obvious.
    """
    if isinstance(arguments, str):
        patch = list(_from_patch(arguments))
        return patch or (list(_from_shell(arguments)) if _SHELLS.match(name) else [])
    if not isinstance(arguments, dict):
        return []
    command = arguments.get("command", arguments.get("cmd"))
    if isinstance(command, list):
        command = str(command[-1]) if command else ""
    action: Action | None = _EDITOR_COMMANDS.get(command) if isinstance(command, str) else None
    if action is None and isinstance(command, str) and (_SHELLS.match(name) or "*** Begin Patch" in command):
        return list(_from_patch(command)) or list(_from_shell(command))
    patch = [t for key in ("input", "patch", "diff") for t in _from_patch(str(arguments.get(key) or ""))]
    if patch:
        return patch
    if action is None and _NO_FILES.search(name) and not name.lower().startswith("read"):
        return []
    verb = _verb(name)
    done: Action = action or verb or "referenced"
    paths: list[Any] = [next((arguments[k] for k in _PATH_KEYS if isinstance(arguments.get(k), str)), None)]
    paths += [p for key in ("paths", "files", "file_paths") for p in _as_list(arguments.get(key))]
    return [FileTouch(normalise(p), done) for p in paths if _is_path(p) and (verb or _named_like_a_file(p))]


def _verb(name: str) -> Action | None:
    for pattern, action in _VERBS:
        if pattern.search(name):
            return action
    return None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= 4096 and "\n" not in value and "://" not in value


def _named_like_a_file(path: str) -> bool:
    name = normalise(path).rpartition("/")[2]
    return name in _NAMES or bool(re.fullmatch(r"[\w.+@-]*\w\.[A-Za-z]\w{0,9}", name))


def _from_patch(text: str) -> Iterator[FileTouch]:
    if "*** " in text:
        for verb, path, move, target in _PATCH_HEADER.findall(text):
            yield FileTouch(normalise(path or target), _PATCH_ACTIONS[verb or move])
    elif "\n+++ " in text or text.startswith("+++ "):
        yield from (
            FileTouch(normalise(path), "modified") for path in _DIFF_HEADER.findall(text) if path != "/dev/null"
        )


_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1(.*?)\n.*?(?:^\s*\2\s*$|\Z)", re.DOTALL | re.MULTILINE)
_SEPARATORS = frozenset({"&&", "||", ";", "|", "&"})
_READERS = frozenset({"cat", "head", "tail", "less", "more", "nl", "wc", "bat", "open", "view"})
_DELETERS = frozenset({"rm", "unlink", "trash"})
_MAKERS = frozenset({"touch", "tee"})
# Without one of each of these no line yields a file: nearly all lines are spared the splitting.
_NO_QUOTES = str.maketrans("", "", "'\"\\")
_TOUCHES = re.compile(rf">|\b(?:mv|cp|sed|{'|'.join(sorted(_READERS | _DELETERS | _MAKERS))})\b")
_FILE_LIKE = re.compile(rf"\w\.[A-Za-z]|{'|'.join(map(re.escape, sorted(_NAMES)))}")


def _from_shell(command: str) -> Iterator[FileTouch]:
    """Files of a command line; a heredoc's body is no command. Quoting errors end the reading, without complaint."""
    for line in _HEREDOC.sub(r" \3\n", command[:MAX_COMMAND_CHARS]).splitlines():
        bare = line.translate(_NO_QUOTES)
        if not (_TOUCHES.search(bare) and _FILE_LIKE.search(bare)):
            continue
        try:
            tokens = split_words(line)
        except ValueError:
            continue
        simple: list[str] = []
        for token in [*tokens, ";"]:
            if token in _SEPARATORS:
                yield from _from_simple_command(simple)
                simple = []
            else:
                simple.append(token)


def _from_simple_command(words: list[str]) -> Iterator[FileTouch]:
    """One command with its redirections."""
    arguments: list[str] = []
    skip = False
    for i, word in enumerate(words):
        if skip:
            skip = False
        elif word in (">", ">>"):
            target = words[i + 1] if i + 1 < len(words) else ""
            skip = True
            if _named_like_a_file(target):
                yield FileTouch(normalise(target), "modified" if word == ">>" else "created")
        else:
            arguments.append(word)
    while arguments and (re.fullmatch(r"\w+=.*", arguments[0]) or arguments[0] in ("sudo", "git", "command")):
        arguments.pop(0)
    if not arguments:
        return
    program = arguments[0].rpartition("/")[2]
    files = [normalise(a) for a in arguments[1:] if not a.startswith("-") and _named_like_a_file(a)]
    if program in ("mv", "cp") and len(files) >= 2:
        if program == "mv":
            yield from (FileTouch(f, "deleted") for f in files[:-1])
        yield FileTouch(files[-1], "created")
        return
    action: Action | None = None
    if program in _READERS:
        action = "read"
    elif program in _DELETERS:
        action = "deleted"
    elif program in _MAKERS:
        action = "created"
    elif program == "sed":
        action = "modified" if any(a.startswith("-i") for a in arguments) else "read"
    if action:
        for file in files:
            yield FileTouch(file, action)
