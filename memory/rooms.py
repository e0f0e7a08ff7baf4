"""Rooms: the shared places that exchanges about the same file, concept or kind of work are filed under (card 001)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256

from workbench.memory.files import normalise
from workbench.memory.types import Exchange, FileTouch, Room

MAX_ROOMS = 3

_FILE_RELEVANCE = {"modified": 1.0, "created": 1.0, "deleted": 0.9, "read": 0.7, "referenced": 0.6}
_LOCKFILES = re.compile(r"(?:^|/)(?:[\w.-]*lock(?:\.\w+)?|go\.sum)$|\.(?:png|jpg|svg|pdf|log|pid|sock)$")

# The kinds of work, by the words that a user's turn asks for them with; the first kind in this list is taken.
_WORKFLOW_WORDS = """
debugging: bug bugs fix fixes fixed fixing error errors crash crashes broken fail fails failed failing failure debug
review: review reviews reviewing reviewer feedback pr comment comments findings
testing: test tests tested testing coverage e2e benchmark
refactoring: refactor refactoring cleanup rename renamed simplify extract dedupe reorganize move split
planning: plan plans planning design brainstorm requirements proposal architecture
documentation: doc docs document documentation readme changelog
release: release deploy publish ci pipeline
version-control: commit commits committed merge rebase branch push git
setup: install setup configure config configuration environment dependency dependencies
explanation: explain why how what understand where
building: add implement create build write support feature change update make
"""
_KINDS = [line.partition(":")[0] for line in _WORKFLOW_WORDS.strip().splitlines()]
_KIND_OF = {
    word: number
    for number, line in enumerate(_WORKFLOW_WORDS.strip().splitlines())
    for word in line.partition(":")[2].split()
}
_ASKED_CHARS = 2000  # of the user's words that are looked at for the kind of work
_FALLBACK = "conversation"


def room_id(room_type: str, key: str, project: str) -> str:
    """First 16 hex digits of sha256("type:key:project"): the same room whichever distiller named it."""
    return sha256(f"{room_type}:{key}:{project}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def room_key(room: Room, project: str) -> str:
    """The key under which a room is kept, however a distiller spelt it."""
    if room.room_type == "file":
        return _relative(normalise(room.key), project)
    return concept_key(room.key) or room.key.strip().lower()


def assign_rooms(exchange: Exchange, concepts: Sequence[str] = ()) -> tuple[Room, ...]:
    """One to three rooms: the file worked on, the leading concept, the kind of work; at most one of each.

    Args:
        exchange: its files (strongest action first) and its user's words decide.
        concepts: terms in falling importance, as written; the first that is no file's name is taken.
    """
    rooms: list[Room] = []
    main = _main_file(exchange.files)
    if main:
        key = _relative(main.path, exchange.project)
        rooms.append(Room("file", key, key.rpartition("/")[2], _FILE_RELEVANCE[main.action]))
    stem = rooms[0].label.partition(".")[0].lower() if rooms else ""
    for concept in concepts:
        key = concept_key(concept)
        if key and key != stem:
            rooms.append(Room("concept", key, concept, 0.8))
            break
    asked = re.findall(r"[a-z0-9]+", exchange.user_text[:_ASKED_CHARS].lower())
    kind = min((_KIND_OF[word] for word in asked if word in _KIND_OF), default=None)
    if kind is not None or not rooms:
        workflow = _FALLBACK if kind is None else _KINDS[kind]
        rooms.append(Room("workflow", workflow, workflow.replace("-", " "), 0.5))
    return tuple(rooms[:MAX_ROOMS])


def concept_key(label: str) -> str:
    """Lower case, words joined by "-": "Shadow branch", "shadow_branch" and "shadowBranch" are one concept."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", label)
    return "-".join(re.findall(r"[^\W_]+", spaced.lower()))[:80]


def _main_file(files: Sequence[FileTouch]) -> FileTouch | None:
    """The file with the strongest action, the earliest of equals; lock files and pictures come last."""
    return max(
        files,
        key=lambda f: (not _LOCKFILES.search(f.path), _FILE_RELEVANCE[f.action]),
        default=None,
    )


def _relative(path: str, project: str) -> str:
    """The path below the project's directory, so that two clones of a project share their rooms."""
    root = project.replace("\\", "/").rstrip("/")
    if root and path.startswith(f"{root}/"):
        return path[len(root) + 1 :]
    return path
