-- Logs. Verbatim: rows of messages and parts are inserted and never changed, but for messages.thread and token
-- counts (both derived). `seq` grows with every insert, so that DuckDB's zone maps find a conversation's rows.
CREATE TABLE sources (
    source_id VARCHAR NOT NULL,          -- digest of the path
    path VARCHAR NOT NULL,
    format VARCHAR,                      -- NULL: not recognised as a log
    size_bytes BIGINT NOT NULL,          -- -1: reading was interrupted at bytes_read
    mtime_ns BIGINT NOT NULL,
    bytes_read BIGINT NOT NULL,          -- where the next read begins (logs that grow)
    fingerprint VARCHAR NOT NULL,        -- digest of the bytes just before bytes_read: tells growth from replacement
    session JSON,                        -- what a resumed read must know of the session
    skipped JSON,                        -- {kind: count} of records that are no speech
    updated_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE conversations (
    conversation_id VARCHAR NOT NULL,
    format VARCHAR NOT NULL,
    session_id VARCHAR NOT NULL,         -- the log's own
    agent VARCHAR,
    project VARCHAR,
    title VARCHAR,
    model VARCHAR,
    parent_session_id VARCHAR,
    active_leaf VARCHAR,
    started_at TIMESTAMPTZ,
    ended_at TIMESTAMPTZ,
    source_id VARCHAR NOT NULL,
    path VARCHAR NOT NULL,
    first_seq BIGINT NOT NULL,
    num_messages BIGINT NOT NULL,
    meta JSON
);
CREATE TABLE messages (
    seq BIGINT NOT NULL,
    message_id VARCHAR NOT NULL,
    conversation_id VARCHAR NOT NULL,
    ply INTEGER NOT NULL,                -- 0, 1, 2 … within the conversation, in the order of the log
    thread VARCHAR NOT NULL,             -- '' = the active branch; 'branch:…' | 'revision:…' | 'agent:…'
    role VARCHAR NOT NULL,
    native_id VARCHAR NOT NULL,
    parent_native_id VARCHAR,
    agent_id VARCHAR,
    created_at TIMESTAMPTZ,
    model VARCHAR,
    tokens_in BIGINT,
    tokens_out BIGINT,
    tokens_cached BIGINT,
    source_id VARCHAR NOT NULL,
    source_offset BIGINT NOT NULL,
    source_length BIGINT NOT NULL,
    meta VARCHAR                         -- JSON; VARCHAR because validating it again on insert costs time
);
CREATE TABLE parts (
    seq BIGINT NOT NULL,
    part_id VARCHAR NOT NULL,
    message_id VARCHAR NOT NULL,
    conversation_id VARCHAR NOT NULL,
    ordinal INTEGER NOT NULL,            -- order of parts: by seq, then ordinal
    kind VARCHAR NOT NULL,               -- workbench.data.records.PART_KINDS
    text VARCHAR NOT NULL,
    name VARCHAR,
    call_id VARCHAR,
    is_error BOOLEAN,
    data VARCHAR                         -- JSON
);
CREATE TABLE quarantine (
    quarantine_id VARCHAR NOT NULL,
    source_id VARCHAR NOT NULL,
    path VARCHAR NOT NULL,
    format VARCHAR,
    byte_offset BIGINT NOT NULL,
    byte_length BIGINT NOT NULL,
    reason VARCHAR NOT NULL,
    raw BLOB NOT NULL,                   -- at most the first MiB
    unfinished BOOLEAN NOT NULL,         -- the last line of a log that may still be growing
    created_at TIMESTAMPTZ NOT NULL
);

-- Exchanges: a user turn and all that answered it. Derived from messages; rebuilt when a conversation changes.
CREATE TABLE exchanges (
    seq BIGINT NOT NULL,                 -- grows with every insert
    exchange_id VARCHAR NOT NULL,
    conversation_id VARCHAR NOT NULL,
    thread VARCHAR NOT NULL,
    position INTEGER NOT NULL,           -- 0, 1, 2 … within (conversation, thread): neighbours differ by one
    ply_start INTEGER NOT NULL,          -- first and last message, inclusive; of this thread
    ply_end INTEGER NOT NULL,
    source_id VARCHAR NOT NULL,          -- of the first message: a session can be spread over files
    started_at TIMESTAMPTZ,
    ended_at TIMESTAMPTZ,
    user_text VARCHAR NOT NULL,          -- verbatim words, messages joined by a blank line
    assistant_text VARCHAR NOT NULL,
    files JSON NOT NULL,                 -- [{"path", "action"}], action: read|modified|created|deleted|referenced
    tools VARCHAR[] NOT NULL,            -- names of the tools called
    num_tokens INTEGER NOT NULL,         -- of user_text and assistant_text together
    content_hash VARCHAR NOT NULL        -- of all that a distiller sees
);

-- Memories: what a distiller made of an exchange. Derived; can be rebuilt at any time.
CREATE TABLE memories (
    memory_id VARCHAR NOT NULL,
    exchange_id VARCHAR NOT NULL,
    distiller VARCHAR NOT NULL,          -- name and version, "extractive/1"
    content_hash VARCHAR NOT NULL,       -- of the exchange that it was made from
    core VARCHAR NOT NULL,
    context VARCHAR NOT NULL,            -- verbatim substring of the exchange
    text VARCHAR NOT NULL,               -- core + newline + context: what is indexed and counted
    num_tokens INTEGER NOT NULL,
    created_at TIMESTAMPTZ NOT NULL,
    details JSON                         -- what the distiller wants kept (model, cost, tags …)
);
CREATE TABLE rooms (
    room_id VARCHAR NOT NULL,            -- first 16 hex digits of sha256("type:key:project")
    room_type VARCHAR NOT NULL,          -- file | concept | workflow
    room_key VARCHAR NOT NULL,
    label VARCHAR NOT NULL,
    project VARCHAR NOT NULL
);
CREATE TABLE memory_rooms (
    memory_id VARCHAR NOT NULL,
    room_id VARCHAR NOT NULL,
    relevance DOUBLE NOT NULL
);
CREATE TABLE llm_cache (
    request_hash VARCHAR NOT NULL,       -- of model, endpoint, parameters and the redacted messages
    response VARCHAR NOT NULL,
    tokens_in BIGINT,
    tokens_out BIGINT,
    created_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE settings (name VARCHAR NOT NULL, value JSON NOT NULL);  -- calibrated fusion weights and the like
