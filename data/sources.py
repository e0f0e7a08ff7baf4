"""Finds what there is to read: files of a folder, members of a zip, compressed files, standard input."""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from workbench.data.importers.base import HEAD_BYTES, Probe
from workbench.errors import InputError

#: A log may begin with lines larger than HEAD_BYTES; the probe reads on until it has a whole one, up to this.
MAX_HEAD_BYTES = 8 << 20
#: Folders that never hold logs and can be huge.
SKIPPED_FOLDERS = {".git", "node_modules", "__pycache__", ".venv"}
#: What a log is never called: opening these only costs time. Everything else is judged by its content.
SKIPPED_SUFFIXES = {
    ".duckdb",
    ".wal",
    ".sqlite",
    ".db",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".webp",
    ".pdf",
    ".so",
    ".pyc",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A file (or member of an archive) to read; size and mtime tell whether it changed since last time.

    `seekable` is True for plain files: only these are resumed inside.
    """

    path: str
    file: Path | None
    member: str | None = None
    size_bytes: int = 0
    mtime_ns: int = 0
    seekable: bool = False


def check(paths: list[str], store: Path) -> None:
    """Looks at what is named before a store is made for it. Raises: InputError, as `find` does."""
    for given in paths:
        if given != "-" and not Path(given).expanduser().is_dir():
            list(find([given], store))


def find(paths: list[str], store: Path | None = None) -> Iterator[Found]:
    """All sources below the given paths in a stable order; "-" is standard input.

    Args: store: what lies beside it under its name is passed over: to open and close the file of a store that this
        process has open would give up its lock (POSIX).

    Raises: InputError for a path that does not exist or is no file, or a zip that cannot be opened.
    """
    for given in paths:
        if given == "-":
            yield Found("-", None)
            continue
        path = Path(given).expanduser()
        if path.is_dir():
            yield from _find_in_folder(path, store.resolve() if store else None)
        elif store and path.exists() and store.exists() and path.samefile(store):
            raise InputError(f"{given} is the store itself. Give a log file, a folder of logs, a zip, or - for stdin.")
        elif path.exists() and not path.is_file():
            raise InputError(f"{given} is a pipe or a device. Send it to standard input: … | workbench ingest -")
        elif path.exists():
            yield from _find_in_file(path, required=True)
        else:
            raise InputError(
                f"{given} does not exist. Give a log file, a folder of logs, a zip, or - for standard input."
            )


def _find_in_folder(folder: Path, store: Path | None) -> Iterator[Found]:
    for root, folders, names in os.walk(folder):
        own = store.name if store and Path(root).resolve() == store.parent else None
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not _belongs_to(f, own))
        for name in sorted(names):
            path = Path(root, name)
            if path.suffix.lower() not in SKIPPED_SUFFIXES and not _belongs_to(name, own) and path.is_file():
                yield from _find_in_file(path, required=False)


def _belongs_to(name: str, store: str | None) -> bool:
    return store is not None and (name == store or name.startswith(store + "."))


def _find_in_file(path: Path, required: bool) -> Iterator[Found]:
    try:
        stat = path.stat()
        with path.open("rb") as f:
            magic = f.read(4)
    except FileNotFoundError:  # it went while the folder was being listed
        return
    except OSError as error:
        if required:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        yield Found(_shown(path), path)  # reading it says why
        return
    shown = _shown(path)
    if magic != b"PK\x03\x04":
        plain = magic[:2] != b"\x1f\x8b" and magic != b"\x28\xb5\x2f\xfd"
        yield Found(shown, path, None, stat.st_size, stat.st_mtime_ns, plain)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir() and m.file_size]
    except _ZIP_ERRORS as error:
        if required:
            raise InputError(
                f"{path} is a damaged zip: {error}. Unpack what can be saved and ingest the folder."
            ) from error
        yield Found(shown, path, None, stat.st_size, stat.st_mtime_ns)  # reading it says why
        return
    for member in sorted(members, key=lambda m: m.filename):
        if Path(member.filename).suffix.lower() not in SKIPPED_SUFFIXES:
            yield Found(f"{shown}!/{member.filename}", path, member.filename, member.file_size, stat.st_mtime_ns)


#: What zipfile raises on a damaged directory.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError, OSError)


def _shown(path: Path) -> str:
    """The absolute path; bytes that are no UTF-8 are escaped, because the store and JSON hold text."""
    return os.fsencode(path.resolve()).decode("utf-8", "backslashreplace")


@contextmanager
def opened(found: Found, start: int = 0) -> Iterator[BinaryIO]:
    """The decompressed bytes of a source from `start` on.

    Raises: OSError, also for damaged compression, an encrypted member, and .zst without the zstandard package; while
        reading also EOFError, zlib.error, lzma.LZMAError and zipfile.BadZipFile.
    """
    if found.file is None:
        if sys.stdin is None:
            raise InputError("Standard input is closed: nothing can be read from it.")
        with _decompressed(sys.stdin.buffer) as stream:
            yield stream
    elif found.member is not None:
        with zipfile.ZipFile(found.file) as archive:
            try:
                member = archive.open(found.member)
            except (*_ZIP_ERRORS, RuntimeError, KeyError) as error:
                raise OSError(f"damaged or encrypted member of a zip: {error}") from error
            with member, _decompressed(member) as stream:
                yield stream
    else:
        with found.file.open("rb") as plain:
            if start:
                plain.seek(start)
                yield plain
            else:
                with _decompressed(plain) as stream:
                    yield stream


@contextmanager
def _decompressed(packed: Any) -> Iterator[BinaryIO]:
    """The bytes of a stream that may be compressed. Args: packed: has peek(). Raises: OSError for an archive."""
    magic = packed.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        stream: Any = gzip.GzipFile(fileobj=packed)
    elif magic == b"\x28\xb5\x2f\xfd":
        stream = _zstd(packed)
    elif magic == b"PK\x03\x04":
        raise OSError("it is a zip that is damaged, inside another archive or on standard input: unpack it first")
    else:
        stream = packed
    if stream.peek(512)[257:262] == b"ustar":
        raise OSError("it is a tar archive: unpack it first")
    yield stream


def _zstd(plain: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise OSError("it is zstd-compressed: pip install zstandard, or decompress it first") from error
    return cast(BinaryIO, io.BufferedReader(_Zstd(plain, zstandard), 1 << 18))


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames; damage and a missing end are an OSError, as they are for gzip."""

    def __init__(self, plain: BinaryIO, zstandard: Any) -> None:
        self._plain, self._zstandard = plain, zstandard
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            self._compressed = self._compressed or self._plain.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise OSError("the zstd stream has no end: it was cut")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._zstandard.ZstdError as error:
                raise OSError(f"damaged zstd: {error}") from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        chunk, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


def probe(stream: BinaryIO) -> tuple[Probe, BinaryIO]:
    """Looks at the beginning of a stream; returns the probe and a stream that begins where the given one did.

    Reads HEAD_BYTES, and on until a whole line is there, up to MAX_HEAD_BYTES.
    """
    head, complete = b"", False
    while not complete and len(head) < MAX_HEAD_BYTES:
        chunk = stream.read(HEAD_BYTES)
        complete = not chunk
        head += chunk
        if len(head) >= HEAD_BYTES and b"\n" in head:
            break
    return Probe(head, complete), cast(BinaryIO, io.BufferedReader(_Replayed(head, stream), 1 << 18))


class _Replayed(io.RawIOBase):
    """The bytes that were read ahead, then the rest of the stream."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = memoryview(head)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = len(buffer)
        chunk = self._head[:size] if self._head else self._rest.read(size)
        self._head = self._head[size:]
        buffer[: len(chunk)] = chunk
        return len(chunk)
