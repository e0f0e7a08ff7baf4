"""The arithmetic of attention with tangents on tiles: `attention_jvp.py` explains it and makes it differentiable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.kernels.attention_mask import Visibility


class TileOptions(NamedTuple):
    """What is constant over tiles; sizes count rows of one head."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    tile_queries: int
    tile_keys: int


class _Heads:
    """The inputs with query heads gathered by key head, so that grouped queries cost no copy of the keys.

    Queries become [N, G, Lq, D], keys [N, Lk, D], where N counts batch x key heads and G query heads per key head.
    """

    def __init__(
        self, q: Tensor, k: Tensor, key_padding: Tensor | None, mask: Tensor | None, options: TileOptions
    ) -> None:
        self.batch, self.query_heads, self.num_queries, _ = q.shape
        self.key_heads, self.num_keys = k.shape[1:3]
        self.groups = self.query_heads // self.key_heads
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.visible = Visibility(self.num_queries, self.num_keys, options.causal, options.window, key_padding, mask)

    def queries(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.to(self.wide).reshape(self.batch * self.key_heads, self.groups, self.num_queries, x.shape[-1])

    def keys(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.to(self.wide).reshape(self.batch * self.key_heads, self.num_keys, x.shape[-1])

    def tiles(self, options: TileOptions):
        for q0 in range(0, self.num_queries, options.tile_queries):
            q1 = min(q0 + options.tile_queries, self.num_queries)
            first, end = self.visible.key_range(q0, q1)
            yield q0, q1, [(k0, min(k0 + options.tile_keys, end)) for k0 in range(first, end, options.tile_keys)]

    def hide(self, scores: Tensor, q0: int, q1: int, k0: int, k1: int) -> None:
        """Sets the scores [N, G * queries, keys] of invisible keys to -inf."""
        seen = self.visible.tile(q0, q1, k0, k1, scores.device)
        if seen is not None:
            shape = (self.batch, self.query_heads, q1 - q0, k1 - k0)
            scores.view(shape).masked_fill_(~seen, -torch.inf)


def _rows(x: Tensor | None, q0: int, q1: int) -> Tensor | None:
    """Rows of a tile, the query heads of one key head stacked: [N, G * queries, D]."""
    return None if x is None else x[:, :, q0:q1].flatten(1, 2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _scores(qt: Tensor, kt: Tensor, tqt: Tensor | None, tkt: Tensor | None, options: TileOptions):
    """Scores of a tile and, with tangents, theirs; `tanh` of the raw scores where they are soft-capped.

    The query rows come scaled.
    """
    s = qt @ kt.transpose(1, 2)
    ts = None
    if tqt is not None:
        ts = tqt @ kt.transpose(1, 2)
    if tkt is not None:
        ts = qt @ tkt.transpose(1, 2) if ts is None else ts.baddbmm_(qt, tkt.transpose(1, 2))
    if options.softcap is None:
        return s, ts, None
    u = s.div_(options.softcap).tanh_()
    s = u * options.softcap
    return s, None if ts is None else ts * (1 - u * u), u


def forward_tiles(q, k, v, tq, tk, tv, key_padding, mask, options: TileOptions):
    heads = _Heads(q, k, key_padding, mask, options)
    qs, tqs = heads.queries(q), heads.queries(tq)
    ks, vs, tks, tvs = (heads.keys(x) for x in (k, v, tk, tv))
    assert qs is not None
    assert ks is not None
    assert vs is not None
    n, groups, num_queries, _ = qs.shape
    has_tangent = not (tq is tk is tv is None)
    out = qs.new_empty(n, groups, num_queries, vs.shape[-1])
    lse, mean = qs.new_empty(n, groups, num_queries, 1), qs.new_zeros(n, groups, num_queries, 1)
    tangent = torch.empty_like(out) if has_tangent else None
    for q0, q1, spans in heads.tiles(options):
        qt, tqt = _rows(qs, q0, q1), _rows(tqs, q0, q1)
        assert qt is not None
        tqt = None if tqt is None else tqt * options.scale
        state = _Running(qt, vs.shape[-1], has_tangent)
        qt = qt * options.scale
        for k0, k1 in spans:
            tkt, tvt = (None if x is None else x[:, k0:k1] for x in (tks, tvs))
            s, ts, _ = _scores(qt, ks[:, k0:k1], tqt, tkt, options)
            heads.hide(s, q0, q1, k0, k1)
            state.add(s, ts, vs[:, k0:k1], tvt)
        o, to, log_sum, mu = (x.unflatten(1, (groups, q1 - q0)) for x in state.finish())
        out[:, :, q0:q1], lse[:, :, q0:q1] = o, log_sum
        if tangent is not None:
            tangent[:, :, q0:q1], mean[:, :, q0:q1] = to, mu
    rows = (heads.batch, heads.query_heads, num_queries)
    shape = (*rows, vs.shape[-1])
    empty = q.new_empty(heads.batch, 0)
    return (
        out.view(shape).to(q.dtype),
        empty if tangent is None else tangent.view(shape).to(q.dtype),
        lse.view(rows),
        mean.view(rows),
    )


class _Running:
    """The sums over keys of one tile of queries, kept relative to the largest score so far."""

    def __init__(self, qt: Tensor, width: int, has_tangent: bool) -> None:
        n, rows, _ = qt.shape
        self.top = qt.new_full((n, rows, 1), -torch.inf)
        self.total = qt.new_zeros(n, rows, 1)
        self.out = qt.new_zeros(n, rows, width)
        self.score_tangent = torch.zeros_like(self.total)
        self.tangent = torch.zeros_like(self.out) if has_tangent else None

    def add(self, s: Tensor, ts: Tensor | None, vt: Tensor, tvt: Tensor | None) -> None:
        top = torch.maximum(self.top, s.amax(-1, keepdim=True))
        # A row that has seen nothing yet has top -inf; -inf - -inf would be NaN.
        base = top.masked_fill(top == -torch.inf, 0.0)
        shrink = (self.top - base).exp_()
        p = s.sub_(base).exp_()
        self.top = top
        self.total.mul_(shrink).add_(p.sum(-1, keepdim=True))
        self.out.mul_(shrink).baddbmm_(p, vt)
        if self.tangent is None:
            return
        self.tangent.mul_(shrink)
        self.score_tangent.mul_(shrink)
        if tvt is not None:
            self.tangent.baddbmm_(p, tvt)
        if ts is not None:
            weighted = p.mul_(ts)
            self.score_tangent.add_(weighted.sum(-1, keepdim=True))
            self.tangent.baddbmm_(weighted, vt)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, tangent, log-sum-exp (+inf where nothing is visible, so that exp(s - lse) is 0) and mean tangent."""
        empty = self.total == 0
        total = self.total.masked_fill(empty, 1.0)
        out, mean = self.out / total, self.score_tangent / total
        tangent = out if self.tangent is None else self.tangent.div_(total).addcmul_(mean, out, value=-1)
        return out, tangent, (self.top + total.log()).masked_fill(empty, torch.inf), mean


class _BackwardRows:
    """The gradients that one tile of queries gives, summed over tiles of keys."""

    def __init__(self, rows: dict[str, Tensor | None], options: TileOptions) -> None:
        q, self.grad, out = _given(rows, "q"), _given(rows, "grad"), _given(rows, "out")
        self.options = options
        self.q = q * options.scale
        self.tq = None if rows["tq"] is None else rows["tq"] * options.scale
        self.lse, self.mean, self.grad_tangent = _given(rows, "lse"), _given(rows, "mean"), rows["grad_tangent"]
        self.row = _dot(self.grad, out)
        if self.grad_tangent is not None:
            self.row += _dot(self.grad_tangent, _given(rows, "tangent"))
            self.e_mean = _dot(self.grad_tangent, out)
        self.sums = {"q": torch.zeros_like(q)}
        if self.tq is not None:
            self.sums["tq"] = torch.zeros_like(q)

    def add(self, k: Tensor, v: Tensor, tk: Tensor | None, tv: Tensor | None, hide: Callable) -> dict[str, Tensor]:
        """Adds a tile of keys; returns what it gives to the gradients of the keys and values."""
        s, ts, u = _scores(self.q, k, self.tq, tk, self.options)
        hide(s)
        p = s.sub_(self.lse).exp_()
        h = self.grad_tangent
        f = torch.baddbmm(-self.row, self.grad, v.transpose(1, 2))
        found = {"v": p.transpose(1, 2) @ self.grad}
        dts = None
        if h is not None:
            if tv is not None:
                f.baddbmm_(h, tv.transpose(1, 2))
                found["tv"] = p.transpose(1, 2) @ h
            if ts is not None:
                a = ts - self.mean
                e = torch.baddbmm(-self.e_mean, h, v.transpose(1, 2))
                found["v"].baddbmm_((p * a).transpose(1, 2), h)
                f.addcmul_(e, a)
                dts = e.mul_(p)
        ds = f.mul_(p)
        if u is not None:
            ds, dts = self._through_softcap(ds, dts, ts, u)
        self._into_queries_and_keys(found, ds, dts, k, tk)
        return found

    def _through_softcap(self, ds: Tensor, dts: Tensor | None, ts: Tensor | None, u: Tensor):
        # s = c u, u = tanh(x / c), ts = (1 - u^2) tx, hence d ts / dx = -(2 u / c) ts.
        assert self.options.softcap is not None
        slope = 1 - u * u
        ds = ds * slope
        if dts is not None and ts is not None:
            ds -= dts * ts * u * (2 / self.options.softcap)
            dts = dts * slope
        return ds, dts

    def _into_queries_and_keys(self, found: dict[str, Tensor], ds: Tensor, dts: Tensor | None, k: Tensor, tk) -> None:
        self.sums["q"].baddbmm_(ds, k)
        found["k"] = ds.transpose(1, 2) @ self.q
        if dts is None:
            return
        if tk is not None:
            self.sums["q"].baddbmm_(dts, tk)
            found["tk"] = dts.transpose(1, 2) @ self.q
        if self.tq is not None:
            self.sums["tq"].baddbmm_(dts, k)
            found["k"].baddbmm_(dts.transpose(1, 2), self.tq)


def _given(rows: dict[str, Tensor | None], name: str) -> Tensor:
    x = rows[name]
    assert x is not None, name
    return x


def backward_tiles(grad, grad_tangent, inputs, key_padding, mask, results, options: TileOptions) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, tq, tk, tv; those that do not exist are empty, [B, 0].

    Args: grad, grad_tangent (None = zero): gradients of output and tangent; inputs: q, k, v and tangents or None;
    results: what `forward_tiles` returned.
    """
    names = ("q", "k", "v", "tq", "tk", "tv")
    by_name = dict(zip(names, inputs, strict=True))
    out, tangent, lse, mean = results
    if grad_tangent is None:
        by_name |= {"tq": None, "tk": None, "tv": None}
    q = by_name["q"]
    heads = _Heads(q, by_name["k"], key_padding, mask, options)
    by_query = {"q": q, "tq": by_name["tq"], "grad": grad, "grad_tangent": grad_tangent, "out": out}
    by_query |= {"tangent": None if grad_tangent is None else tangent, "lse": lse[..., None], "mean": mean[..., None]}
    by_query = {name: heads.queries(x) for name, x in by_query.items()}
    k, v, tk, tv = (heads.keys(by_name[name]) for name in ("k", "v", "tk", "tv"))
    assert k is not None
    assert v is not None
    wide = {"q": by_query["q"], "tq": by_query["tq"], "k": k, "v": v, "tk": tk, "tv": tv}
    sums = {name: torch.zeros_like(x) for name, x in wide.items() if x is not None}
    for q0, q1, spans in heads.tiles(options):
        rows = _BackwardRows({name: _rows(x, q0, q1) for name, x in by_query.items()}, options)
        for k0, k1 in spans:
            tkt, tvt = (None if x is None else x[:, k0:k1] for x in (tk, tv))
            hide = partial(heads.hide, q0=q0, q1=q1, k0=k0, k1=k1)
            found = rows.add(k[:, k0:k1], v[:, k0:k1], tkt, tvt, hide)
            for name, x in found.items():
                sums[name][:, k0:k1].add_(x)
        for name, x in rows.sums.items():
            sums[name][:, :, q0:q1] = x.mul_(options.scale).unflatten(1, (heads.groups, q1 - q0))
    empty = q.new_zeros(heads.batch, 0)
    return tuple(sums[name].view(x.shape).to(x.dtype) if x is not None else empty for name, x in by_name.items())
