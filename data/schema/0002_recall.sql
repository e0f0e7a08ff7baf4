-- Recall: derived from exchanges and memories, and rebuilt from them at any time. Every layer of text
-- ("verbatim", "distilled/<distiller>") numbers its documents by exchanges.seq.
CREATE TABLE lexical_layers (
    layer SMALLINT NOT NULL,
    name VARCHAR NOT NULL,
    tokenizer VARCHAR NOT NULL,          -- workbench.memory.tokenizers, with its version
    revision BIGINT NOT NULL             -- grows with every change of the layer's documents
);
CREATE TABLE lexical_documents (
    layer SMALLINT NOT NULL,
    doc INTEGER NOT NULL,                -- exchanges.seq
    back INTEGER NOT NULL,               -- doc minus the doc before it in the same thread; 0: there is none
    length INTEGER NOT NULL,             -- in terms
    length_user INTEGER NOT NULL,        -- the part of it in the user's words
    revision BIGINT NOT NULL             -- of the layer when the document was added
);
-- Sorted by (layer, term, doc), so that zone maps find a term; rewritten only by compaction.
CREATE TABLE lexical_postings (
    layer SMALLINT NOT NULL,
    term UBIGINT NOT NULL,               -- first 8 bytes of BLAKE2b of the term, little-endian
    doc INTEGER NOT NULL,
    tf INTEGER NOT NULL,
    tf_user INTEGER NOT NULL             -- the part of tf in the user's words
);
-- What was added since the last compaction, unsorted.
CREATE TABLE lexical_recent (
    layer SMALLINT NOT NULL,
    term UBIGINT NOT NULL,
    doc INTEGER NOT NULL,
    tf INTEGER NOT NULL,
    tf_user INTEGER NOT NULL
);
-- Document frequencies of lexical_postings, counted by compaction; a later removal adds rows of -1.
CREATE TABLE lexical_terms (
    layer SMALLINT NOT NULL,
    term UBIGINT NOT NULL,
    df INTEGER NOT NULL
);
-- How many terms had which document frequency at the last compaction.
CREATE TABLE lexical_histogram (
    layer SMALLINT NOT NULL,
    df INTEGER NOT NULL,
    num_terms BIGINT NOT NULL
);

-- Vectors of a layer's documents under one embedding model.
CREATE TABLE embedding_spaces (
    space SMALLINT NOT NULL,
    layer VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    dim INTEGER NOT NULL,
    revision BIGINT NOT NULL             -- grows with every change of the space's vectors
);
CREATE TABLE embeddings (
    space SMALLINT NOT NULL,
    doc INTEGER NOT NULL,                -- exchanges.seq
    revision BIGINT NOT NULL,            -- of the space when the vector was added
    vector BLOB NOT NULL                 -- dim × float16, little-endian; of length 1 (or 0: a text without words)
);
-- Embedding models that were learnt from the store's own text.
CREATE TABLE embedding_models (
    model VARCHAR NOT NULL,
    dim INTEGER NOT NULL,
    num_documents BIGINT NOT NULL,       -- how many texts the store had of which it was learnt
    scale FLOAT NOT NULL,                -- length of the vector of a word that it has not seen
    created_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE embedding_features (
    model VARCHAR NOT NULL,
    feature UBIGINT NOT NULL,            -- hash of a word or of a pair of words
    idf FLOAT NOT NULL,
    vector BLOB NOT NULL                 -- dim × float16, little-endian
);
