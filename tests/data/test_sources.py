"""What there is to read: folders, zips, compressed files, standard input, and what cannot be read."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import store_helpers as helpers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import api
from workbench.data import importers
from workbench.data.ingest import Report
from workbench.data.sources import find, opened, probe
from workbench.data.store import Store
from workbench.errors import InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.duckdb"


def session(name: str, turns: int = 3) -> bytes:
    rows = helpers.claude_session(random.Random(name), name, turns)
    return b"".join(helpers.json.dumps(row).encode() + b"\n" for row in rows)


def reasons(path: Path) -> list[tuple[str, str]]:
    with Store(path, read_only=True) as store:
        rows = store.con.execute("SELECT path, reason FROM quarantine ORDER BY path, byte_offset").fetchall()
    return [(Path(p).name, reason) for p, reason in rows]


def numbers(report: Report) -> tuple[int, int]:
    return report.conversations_added, report.quarantined


def test_folder_with_mixed_content(path: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (logs / "deep" / "er").mkdir(parents=True)
    (logs / "node_modules").mkdir()
    (logs / "deep" / "er" / "a.jsonl").write_bytes(session("a"))
    (logs / "no-suffix").write_bytes(session("b"))
    (logs / "node_modules" / "c.jsonl").write_bytes(session("c"))
    (logs / "notes.md").write_text("# not a log\n")
    (logs / "picture.png").write_bytes(session("d"))
    (logs / "empty.jsonl").write_bytes(b"")
    (logs / "blank.jsonl").write_bytes(b"\n \n")
    (logs / "gone.jsonl").symlink_to(logs / "nowhere")
    os.mkfifo(logs / "pipe.jsonl")
    report = api.ingest([logs], path)
    assert numbers(report) == (2, 0)
    assert [Path(p).name for p in report.not_logs] == ["notes.md"]
    again = api.ingest([logs], path)
    assert numbers(again) == (0, 0)
    assert again.bytes_read == 0
    assert [Path(p).name for p in again.not_logs] == ["notes.md"]


def test_a_grown_log_that_goes_while_others_are_read(path: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.jsonl").write_bytes(session("a"))
    api.ingest([logs], path)
    (logs / "a.jsonl").write_bytes(session("a") + session("more"))
    (logs / "b.jsonl").write_bytes(session("b"))
    report = api.ingest([logs], path, progress=lambda source, _: Path(source).name == "a.jsonl" and os.remove(source))
    assert numbers(report) == (1, 0)


def test_a_pipe_is_refused_with_the_way_to_read_it(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="workbench ingest -"):
        api.ingest([tmp_path / "pipe"], path)


def test_what_was_no_log_is_judged_again_by_other_importers(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "a.jsonl"
    log.write_bytes(session("a"))
    with monkeypatch.context() as older:
        older.setattr(importers, "IMPORTERS", ("codex", "pi"))
        older.setattr(importers, "fingerprint", lambda: "older")
        assert len(api.ingest([log], path).not_logs) == 1
        assert api.ingest([log], path).files_unchanged == 1
    assert api.ingest([log], path).conversations_added == 1
    assert api.ingest([log], path).files_unchanged == 1


def test_unreadable_file_is_reported_and_the_rest_is_read(path: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.jsonl").write_bytes(session("a"))
    broken = logs / "b.jsonl"
    broken.symlink_to("/proc/self/mem")  # opens, but its first bytes cannot be read
    (logs / "c.jsonl").write_bytes(session("c"))
    report = api.ingest([logs], path)
    assert numbers(report) == (2, 1)
    [(_, reason)] = reasons(path)
    assert reason.startswith("cannot be read further")
    assert numbers(api.ingest([logs], path)) == (0, 1)
    assert len(reasons(path)) == 1
    with pytest.raises(InputError, match="cannot be read"):
        api.ingest([broken], path)


def test_paths_that_do_not_exist(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        api.ingest([tmp_path / "none"], path)
    helpers.assert_one_message(helpers.workbench(path, "ingest", tmp_path / "none"), 2)


def test_what_cannot_be_meant_makes_no_store(path: Path, tmp_path: Path) -> None:
    (tmp_path / "unreadable").symlink_to("/proc/self/mem")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "good.jsonl").write_bytes(session("a"))
    for name in ("none", "unreadable", "pipe", "a.zip"):
        with pytest.raises(InputError):
            api.ingest([tmp_path / "good.jsonl", tmp_path / name], path)
    with pytest.raises(InputError, match="No format"):
        api.ingest([tmp_path / "good.jsonl"], path, format="nonsense")
    assert not path.exists()


def test_names_that_are_no_utf8(path: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/logs-\xff"
    os.mkdir(folder)
    with open(folder + b"/a-\xfe.jsonl", "wb") as f:
        f.write(session("a"))
    report = api.ingest([os.fsdecode(folder)], path)
    assert numbers(report) == (1, 0)
    assert api.ingest([os.fsdecode(folder)], path).bytes_read == 0


# -- the store's own files --------------------------------------------------------------------------------------------


def test_store_inside_the_folder_keeps_its_lock(tmp_path: Path) -> None:
    """Its file is not even opened: to close it would give up this process's lock on it."""
    for i, name in enumerate(("store", "w.duckdb", "w.log")):
        logs = tmp_path / str(i)
        logs.mkdir()
        (logs / "a.jsonl").write_bytes(session("a"))
        api.remember("a note that waits in the spool beside the store", logs / name)
        assert numbers(api.ingest([logs], logs / name)) == (1, 0)
        assert api.ingest([logs], logs / name).not_logs == []
        found = [Path(f.path).name for f in find([str(logs)], logs / name)]
        assert found == ["a.jsonl"]
        with pytest.raises(InputError, match="the store itself"):
            api.ingest([logs / name], logs / name)


# -- zips -------------------------------------------------------------------------------------------------------------


def make_zip(target: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_with_folders(path: Path, tmp_path: Path, method: int) -> None:
    members = {"x/y/a.jsonl": session("a"), "b.jsonl": session("b"), "x/readme.txt": b"hello", "x/empty": b""}
    archive = make_zip(tmp_path / "export.zip", members, method)
    report = api.ingest([archive], path)
    assert numbers(report) == (2, 0)
    with Store(path, read_only=True) as store:
        paths = store.con.execute("SELECT path FROM conversations ORDER BY path").fetchall()
    assert [p for (p,) in paths] == [f"{archive}!/b.jsonl", f"{archive}!/x/y/a.jsonl"]
    assert api.ingest([archive], path).bytes_read == 0


def test_what_is_compressed_inside_a_zip_is_read_and_archives_inside_are_named(path: Path, tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"c.jsonl": session("c")}).read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("d.jsonl")
        member.size = len(session("d"))
        tar.addfile(member, io.BytesIO(session("d")))
    archive = make_zip(tmp_path / "logs.zip", {
        "a.jsonl.gz": gzip.compress(session("a")), "b.jsonl.zst": zstandard.compress(session("b")),
        "c.zip": inner, "d.tgz": buffer.getvalue()})  # fmt: skip
    assert numbers(api.ingest([archive], path)) == (2, 2)
    assert [(name, "zip" in reason, "tar" in reason) for name, reason in reasons(path)] == [
        ("c.zip", True, False), ("d.tgz", False, True)]  # fmt: skip


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_standard_input_may_be_compressed(
    path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(session("a", 500))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(whole))))  # type: ignore[arg-type]
    assert numbers(api.ingest(["-"], path)) == (1, 0)
    cut = compress(session("b", 500))[:-100]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(cut))))  # type: ignore[arg-type]
    assert numbers(api.ingest(["-"], path)) == (1, 1)


def test_zip_with_a_damaged_member(path: Path, tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "export.zip", {"a.jsonl": session("a", 30), "b.jsonl": session("b")})
    content = bytearray(archive.read_bytes())
    content[400:440] = bytes(40)
    archive.write_bytes(content)
    report = api.ingest([archive], path)
    assert report.quarantined == 1
    with Store(path, read_only=True) as store:
        assert ("b",) in store.con.execute("SELECT session_id FROM conversations").fetchall()
    [(name, reason)] = reasons(path)
    assert name == "a.jsonl"
    assert reason.startswith("cannot be read further")


def test_damaged_and_encrypted_zips(path: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    whole = make_zip(logs / "cut.zip", {"a.jsonl": session("a", 20)}).read_bytes()
    (logs / "cut.zip").write_bytes(whole[: len(whole) // 2])
    locked = bytearray(make_zip(logs / "locked.zip", {"b.jsonl": session("b")}).read_bytes())
    locked[6] |= 1  # the flag of an encrypted member, in its own and in the directory's header
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (logs / "locked.zip").write_bytes(locked)
    (logs / "c.jsonl").write_bytes(session("c"))
    report = api.ingest([logs], path)
    assert numbers(report) == (1, 2)
    assert [name for name, _ in reasons(path)] == ["cut.zip", "b.jsonl"]
    assert "damaged" in reasons(path)[0][1]
    assert "encrypted" in reasons(path)[1][1]
    with pytest.raises(InputError, match="damaged zip"):
        api.ingest([logs / "cut.zip"], path)
    # repaired: it is read, and leaves quarantine
    (logs / "cut.zip").unlink()
    make_zip(logs / "locked.zip", {"b.jsonl": session("b")})
    assert numbers(api.ingest([logs], path)) == (1, 0)
    assert [name for name, _ in reasons(path)] == ["cut.zip"]


def test_any_zip(tmp_path: Path) -> None:
    whole = make_zip(tmp_path / "a.zip", {"x/a.jsonl": session("a"), "b.txt": b"b" * 99}).read_bytes()
    folder = tmp_path / "any"
    folder.mkdir()
    with Store(tmp_path / "any.duckdb") as store:
        from workbench.data.ingest import ingest

        @settings(max_examples=120, deadline=None, database=None, derandomize=True)
        @given(
            st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6),
            st.integers(4, len(whole)),
        )
        def check(changes: list[tuple[int, int]], length: int) -> None:
            content = bytearray(whole)
            for at, value in changes:
                content[at] = value
            (folder / "a.zip").write_bytes(content[:length])
            report = ingest(store, [str(folder)])
            assert report.files or report.quarantined or report.not_logs or report.files_unchanged or length < 30

        check()


# -- compressed files -------------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def test_compressed_files(path: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.jsonl.gz").write_bytes(gzip.compress(session("a")))
    half = session("b", 6)
    cut = half.index(b"\n", len(half) // 2) + 1
    (logs / "b.jsonl.gz").write_bytes(gzip.compress(half[:cut]) + gzip.compress(half[cut:]))
    (logs / "c.jsonl.zst").write_bytes(zstd(half.replace(b'"b', b'"c')[:cut]) + zstd(half.replace(b'"b', b'"c')[cut:]))
    report = api.ingest([logs], path)
    assert numbers(report) == (3, 0)
    with Store(path, read_only=True) as store:
        counts = store.con.execute("SELECT num_messages FROM conversations ORDER BY session_id").fetchall()
    assert counts[1] == counts[2], "all frames are read"
    assert counts[1][0] == 18
    assert api.ingest([logs], path).bytes_read == 0


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
def test_damaged_compression(path: Path, tmp_path: Path, suffix: str, compress: object) -> None:
    assert callable(compress)
    log = tmp_path / f"a.jsonl{suffix}"
    whole = compress(session("a", 400))
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2 : len(whole) // 2 + 60] = bytes(60)
    for content in (whole[: len(whole) // 2], bytes(spoilt), whole[:9]):
        log.write_bytes(content)
        report = api.ingest([log], path)
        assert report.quarantined >= 1 or report.not_logs, len(content)
    log.write_bytes(whole)
    api.ingest([log], path)
    with Store(path, read_only=True) as store:
        assert store.con.execute("SELECT num_messages FROM conversations").fetchall() == [(1200,)]
        assert store.con.execute("SELECT count(*) FROM quarantine WHERE reason LIKE 'cannot be read%'").fetchall() == [
            (0,)
        ]


def test_standard_input(path: Path) -> None:
    done = helpers.workbench(path, "ingest", "-", "--json", input=session("a").decode())
    assert done.returncode == 0, done.stderr
    assert helpers.json.loads(done.stdout)["conversations"]["added"] == 1
    again = helpers.workbench(path, "ingest", "-", "--json", input=session("a").decode())
    assert helpers.json.loads(again.stdout)["messages"] == {"added": 0, "unchanged": 9}
    helpers.assert_one_message(helpers.workbench(path, "ingest", "-", input="hello\nworld\n"), 2)
    assert helpers.workbench(path, "ingest", "-", input="").returncode == 0


# -- the probe --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 200), st.integers(0, 80))
def test_probe_gives_the_stream_back(content: bytes, size: int, times: int) -> None:
    content = content * times
    head, stream = probe(io.BytesIO(content))
    assert content.startswith(head.head)
    assert head.complete == (len(head.head) == len(content) and head.complete)
    parts = [stream.readline(size) for _ in range(3)]
    assert b"".join(parts) + stream.read() == content


def test_opened_from_an_offset(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"0123456789")
    [found] = find([str(file)])
    with opened(found, 4) as stream:
        assert stream.read() == b"456789"
