-- Training: tasks, what policies wrote for them, what teachers said of it, and runs. Rows are only ever added, but for
-- the status of a run. Token ids are those of the tokenizer that the row names.
CREATE TABLE tasks (
    task_id VARCHAR NOT NULL,
    task_set VARCHAR NOT NULL,           -- gsm8k, rooms-6-0, …
    split VARCHAR NOT NULL,              -- train | test
    prompts JSON NOT NULL,               -- {context: text, or chat messages}
    answer VARCHAR NOT NULL,
    meta JSON NOT NULL,
    created_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE rollouts (
    rollout_id VARCHAR NOT NULL,         -- digest of task, policy, model version, sampling, completion and sample
    task_id VARCHAR NOT NULL,
    policy VARCHAR NOT NULL,             -- the name that sources ask for: teacher, labels, student-base …
    model_version VARCHAR NOT NULL,      -- digest of the weights, a served model's own name, or "worked"
    tokenizer VARCHAR NOT NULL,          -- digest of its vocabulary
    sample INTEGER NOT NULL,             -- 0, 1, 2 … of the same task, policy and version
    prompt_ids INTEGER[] NOT NULL,
    completion_ids INTEGER[] NOT NULL,
    mask UTINYINT[],                     -- 1 = the policy's, 0 = the environment's words; NULL = all 1
    logprobs FLOAT[],                    -- of the policy, natural log
    text VARCHAR NOT NULL,               -- the completion, decoded
    reward DOUBLE,
    verified VARCHAR,                    -- verifier and its version; NULL = not judged
    sampling JSON NOT NULL,              -- temperature, top_p, max_tokens …
    run_id VARCHAR,                      -- of the training run that wrote it
    step INTEGER,
    created_at TIMESTAMPTZ NOT NULL
);
-- A teacher's top-k for each token of a completion, as numbers in bytes: 6 a word.
CREATE TABLE teacher_scores (
    score_id VARCHAR NOT NULL,           -- digest of teacher, prompt ids and completion ids
    teacher VARCHAR NOT NULL,            -- digest of the weights, or a served model's own name
    k INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    ids BLOB NOT NULL,                   -- num_tokens x k int32, little-endian
    logprobs BLOB NOT NULL,              -- num_tokens x k float16, natural log at temperature 1
    created_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE runs (
    run_id VARCHAR NOT NULL,             -- digest of recipe, data, models and code
    method VARCHAR NOT NULL,
    recipe JSON NOT NULL,                -- resolved: every setting
    lineage JSON NOT NULL,               -- digests of student, teachers, tasks and rollouts
    code_version VARCHAR NOT NULL,
    packages JSON NOT NULL,
    folder VARCHAR NOT NULL,             -- checkpoints and the trained model
    status VARCHAR NOT NULL,             -- running | interrupted | done | failed
    error VARCHAR,
    created_at TIMESTAMPTZ NOT NULL,
    ended_at TIMESTAMPTZ
);
CREATE TABLE metrics (
    run_id VARCHAR NOT NULL,
    phase VARCHAR NOT NULL,
    step INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    value DOUBLE NOT NULL
);
CREATE TABLE artifacts (
    run_id VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,               -- model | model card
    path VARCHAR NOT NULL,
    digest VARCHAR NOT NULL
);
-- Answers of a model to a task, sample by sample.
CREATE TABLE evaluations (
    eval_id VARCHAR NOT NULL,            -- digest of task set, split, model, sampling and verifier
    task_id VARCHAR NOT NULL,
    sample INTEGER NOT NULL,
    status VARCHAR NOT NULL,             -- ok | wrong_format | truncated | timeout | policy_error | grader_error
    score DOUBLE,                        -- NULL unless the status is ok, wrong_format or truncated
    text VARCHAR NOT NULL,
    extracted VARCHAR,
    grader VARCHAR NOT NULL,
    tokens INTEGER NOT NULL,
    seconds DOUBLE NOT NULL,
    error VARCHAR
);
CREATE TABLE eval_benches (
    eval_id VARCHAR NOT NULL,
    task_set VARCHAR NOT NULL,
    split VARCHAR NOT NULL,
    data_digest VARCHAR NOT NULL,
    model VARCHAR NOT NULL,              -- what people call it
    model_version VARCHAR NOT NULL,      -- digest of weights and tokenizer, or the served name
    sampling JSON NOT NULL,
    grader VARCHAR NOT NULL,
    run_id VARCHAR,                      -- of the training run that made the model
    created_at TIMESTAMPTZ NOT NULL
);
