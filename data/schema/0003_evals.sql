-- Recall evaluations: what every retriever gave back for every query. Rows are only ever added; scores are worked out
-- from them when a report is made.
CREATE TABLE eval_runs (
    run_id VARCHAR NOT NULL,             -- digest of the columns from task_fingerprint to code_version
    task VARCHAR NOT NULL,
    task_version VARCHAR NOT NULL,
    task_fingerprint VARCHAR NOT NULL,   -- of documents, queries and relevance
    retriever VARCHAR NOT NULL,          -- name
    retriever_fingerprint VARCHAR NOT NULL,
    split VARCHAR NOT NULL,              -- tune | report | all
    k INTEGER NOT NULL,                  -- hits asked for
    code_version VARCHAR NOT NULL,       -- digest of our own source that results depend on
    packages JSON NOT NULL,              -- {name: version}
    created_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE eval_results (
    run_id VARCHAR NOT NULL,
    query_id VARCHAR NOT NULL,
    attempt INTEGER NOT NULL,            -- 1, 2 …; the last one counts
    status VARCHAR NOT NULL,             -- ok | error | timeout
    error VARCHAR,
    docs VARCHAR[] NOT NULL,             -- best first: descending score, equal scores by ascending id
    scores DOUBLE[] NOT NULL,
    tokens INTEGER[] NOT NULL,           -- of what a prompt gets for each hit
    cpu_ms DOUBLE NOT NULL
);
CREATE TABLE eval_builds (
    run_id VARCHAR NOT NULL,
    scope VARCHAR NOT NULL,
    cpu_seconds DOUBLE NOT NULL,
    index_bytes BIGINT NOT NULL,
    num_unindexed BIGINT NOT NULL        -- documents with words that this index cannot find, as far as it tells
);
