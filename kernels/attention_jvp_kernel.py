"""The Triton kernel of `attention_jvp_triton`; a file of its own, since importing it needs Triton."""

# Triton's own names: pointers end in _ptr, compile-time constants are upper case.
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(ptr, rows, cols, num_rows, width):
    """A tile [rows, cols] of a row-major matrix, zero outside."""
    seen = (rows[:, None] < num_rows) & (cols[None, :] < width)
    return tl.load(ptr + rows[:, None] * width + cols[None, :], mask=seen, other=0.0)


@triton.jit
def _dot(a, b, FLOAT32: tl.constexpr):
    # Three TF32 passes keep float32 accuracy on tensor cores; "ieee" spills 40 kB of registers a thread.
    return tl.dot(a, b, input_precision="tf32x3") if FLOAT32 else tl.dot(a, b)


@triton.jit
def _finish(
    out, tangent, top, total, score_tangent, rows, value_cols, head, num_queries, value_width,
    out_ptr, tangent_ptr, lse_ptr, mean_ptr,
):  # fmt: skip
    """Divides the sums of a tile of queries and writes them."""
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    mean = score_tangent / safe
    out = out / safe[:, None]
    tangent = tangent / safe[:, None] - mean[:, None] * out
    inside = rows < num_queries
    where = (head * num_queries + rows[:, None]) * value_width + value_cols[None, :]
    inside_values = inside[:, None] & (value_cols[None, :] < value_width)
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=inside_values)
    tl.store(tangent_ptr + where, tangent.to(tangent_ptr.dtype.element_ty), mask=inside_values)
    lse = tl.where(empty, float("inf"), top + tl.log(safe))
    tl.store(lse_ptr + head * num_queries + rows, lse, mask=inside)
    tl.store(mean_ptr + head * num_queries + rows, mean, mask=inside)


@triton.jit
def attention_jvp_kernel(
    q_ptr, k_ptr, v_ptr, tq_ptr, tk_ptr, tv_ptr, out_ptr, tangent_ptr, lse_ptr, mean_ptr,
    scale, num_queries, num_keys, query_heads, key_heads, width, value_width,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, CAUSAL: tl.constexpr, FLOAT32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    key_head = head // query_heads * key_heads + head % query_heads // (query_heads // key_heads)
    q_ptr += head * num_queries * width
    tq_ptr += head * num_queries * width
    k_ptr += key_head * num_keys * width
    tk_ptr += key_head * num_keys * width
    v_ptr += key_head * num_keys * value_width
    tv_ptr += key_head * num_keys * value_width
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, value_cols = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = _load(q_ptr, rows, cols, num_queries, width)
    tq = _load(tq_ptr, rows, cols, num_queries, width) if HAS_TQ else q
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, score_tangent = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    out, tangent = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    positions = rows + (num_keys - num_queries)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, tl.program_id(0) * BLOCK_M + BLOCK_M + num_keys - num_queries)
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, keys, cols, num_keys, width)
        v = _load(v_ptr, keys, value_cols, num_keys, value_width)
        s = _dot(q, tl.trans(k), FLOAT32) * scale
        seen = keys[None, :] < num_keys
        if CAUSAL:
            seen = seen & (keys[None, :] <= positions[:, None])
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet has top -inf; -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        p = tl.exp(s - base[:, None])
        top = new_top
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + _dot(p.to(v.dtype), v, FLOAT32)
        tangent = tangent * shrink[:, None]
        score_tangent = score_tangent * shrink
        if HAS_TQ or HAS_TK:
            ts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if HAS_TQ:
                ts += _dot(tq, tl.trans(k), FLOAT32)
            if HAS_TK:
                ts += _dot(q, tl.trans(_load(tk_ptr, keys, cols, num_keys, width)), FLOAT32)
            weighted = p * (ts * scale)
            score_tangent += tl.sum(weighted, 1)
            tangent += _dot(weighted.to(v.dtype), v, FLOAT32)
        if HAS_TV:
            tv = _load(tv_ptr, keys, value_cols, num_keys, value_width)
            tangent += _dot(p.to(v.dtype), tv, FLOAT32)
    _finish(
        out, tangent, top, total, score_tangent, rows, value_cols, head, num_queries, value_width,
        out_ptr, tangent_ptr, lse_ptr, mean_ptr,
    )  # fmt: skip
