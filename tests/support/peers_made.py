"""Documents, tiny models and fixtures that the tests of the peers share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from workbench.errors import MissingExtra
from workbench.evals.peers import TAKES_FOLDER, load_peer
from workbench.evals.peers import bi_encoder as bi_encoder_module
from workbench.evals.peers.base import need
from workbench.evals.retriever import Index
from workbench.evals.tasks.base import Document

LEXICAL = ("rank-bm25", "rank-bm25-stem", "bm25s", "fts5")
WORDS = [
    "anchor", "basket", "copper", "dragon", "engine", "forest", "garden", "harbour", "island", "jacket", "kettle",
    "ladder",
]  # fmt: skip

DOCUMENTS = [
    Document("s/2", "We moved the users table to Postgres.", "The migration is in migrations/0007_users.sql."),
    Document("s/10", "Why does the login test fail?", "parseToken reads the expired cookie.", previous="s/2"),
    Document("s/1", "Łódź, 東京 and the café: naïve façades", "\ud800 a lone surrogate", previous="s/10"),
    Document("s/4", 'NEAR("users" AND table) * ^ - : {text} OR', "quoted ''syntax''"),
    Document("s/b", "The cat sat on the mat."),
    Document("s/a", "The cat sat on the mat."),
    Document("s/3", "", "Deploying the engine to the harbour island took an hour."),
    Document("s/5", "An empty kettle in the garden"),
]


def build(name: str, documents: Sequence[Document], folder: Path) -> Index:
    folder.mkdir(parents=True)
    return load_peer(name).build(documents, folder)


# --- tiny models, made here


def tiny_bert(folder: Path, *, labels: int = 0) -> Path:
    """A seeded BERT of 16 dimensions over characters; with labels, one that scores pairs."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:'?"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=labels or 2, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = transformers.BertForSequenceClassification if labels else transformers.BertModel
    kind(config).save_pretrained(folder)
    vocabulary_ids = {token: id for id, token in enumerate(vocabulary)}
    transformers.BertTokenizer(vocab=vocabulary_ids, model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = pytest.importorskip("sentence_transformers", reason="needs workbench[peers]")
    folder = tmp_path_factory.mktemp("bi")
    modules = pytest.importorskip("sentence_transformers.models")
    transformer = modules.Transformer(str(tiny_bert(folder / "bert")))
    pooling = modules.Pooling(16)
    library.SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "model"))
    return f"bi-encoder:{folder / 'model'}"


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("sentence_transformers", reason="needs workbench[peers]")
    return f"cross-encoder:{tiny_bert(tmp_path_factory.mktemp('cross') / 'model', labels=1)}"


@pytest.fixture
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The peer's name, with a tiny model where it takes one; skips what is not installed.

    In place of MiniLM the sums of arms get the tiny model too: what they add up is tested, not how good it is.
    """
    for variable in ("MEM0_TELEMETRY", "MEM0_DIR"):
        monkeypatch.setenv(variable, "False" if variable.endswith("TELEMETRY") else "/nonexistent")
        monkeypatch.delenv(variable)  # so that what the peer sets is undone
    if request.param in TAKES_FOLDER:
        return request.getfixturevalue(request.param.replace("-", "_"))
    if request.param.startswith("combsum"):
        folder = Path(request.getfixturevalue("bi_encoder").partition(":")[2])
        monkeypatch.setattr(bi_encoder_module, "minilm_folder", lambda _: folder)
    try:
        load_peer(request.param).fingerprint()
        if request.param == "mem0":
            need(
                "mem0", "qdrant_client", "mem0ai", extra="mem0"
            )  # not mem0 itself: it reads its settings when imported
    except MissingExtra as error:
        pytest.skip(str(error))
    return request.param
