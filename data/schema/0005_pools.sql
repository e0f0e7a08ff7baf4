-- Pools of a generator's pairs: noise, and the sample that a teacher's sampler makes of it. Chunks are of equal size, so
-- that a pool can be made piece by piece, and a larger one goes on where a smaller one ended. Rows are only ever added.
CREATE TABLE pair_chunks (
    chunk_id VARCHAR NOT NULL,           -- digest of teacher, shape, sampling and the chunk's number
    teacher VARCHAR NOT NULL,            -- digest of the weights
    sampling JSON NOT NULL,              -- solver, steps, guidance, seed, precision
    chunk INTEGER NOT NULL,              -- 0, 1, 2 …
    num INTEGER NOT NULL,                -- pairs in the chunk
    shape INTEGER[] NOT NULL,            -- of one datum
    z BLOB NOT NULL,                     -- num x shape numbers of the sampling's precision, little-endian; normal noise
    x0 BLOB NOT NULL,                    -- the same of the samples
    c BLOB,                              -- num int32, the classes; NULL = none
    created_at TIMESTAMPTZ NOT NULL
);
