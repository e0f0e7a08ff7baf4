"""Pools of pairs in the store: made once, known by teacher and sampler, and a kill loses one chunk at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from workbench.data.store import Store  # noqa: E402
from workbench.errors import InputError  # noqa: E402
from workbench.policies.diffusion import pools  # noqa: E402
from workbench.policies.diffusion.oracle import gauss8  # noqa: E402
from workbench.policies.diffusion.pools import CHUNK, Sampling, supply  # noqa: E402
from workbench.policies.diffusion.samplers import ode, prior, uniform_times  # noqa: E402

FAST = Sampling(steps=2, solver="euler")


def made(folder: Path, num: int = 100, sampling: Sampling = FAST, version: str = "v", **teacher: Any) -> pools.Pool:
    with Store(folder / "s.duckdb"):
        pass
    return supply(folder / "s.duckdb", gauss8(**teacher), version, (2,), num, sampling)


def rows(folder: Path, sql: str) -> list[Any]:
    with Store(folder / "s.duckdb", read_only=True) as store:
        return store.con.execute(sql).fetchall()


def test_a_pool_holds_what_the_teachers_sampler_makes_of_its_noise(tmp_path: Path) -> None:
    teacher, pool = gauss8(num_classes=2), made(tmp_path, num_classes=2)
    table = pool.table
    assert {name: (tuple(one.shape), one.dtype) for name, one in table.items()} == {
        "z": ((100, 2), torch.float32), "x0": ((100, 2), torch.float32), "c": ((100,), torch.int64),
    }  # fmt: skip
    reached = ode(
        teacher, prior(table["z"], teacher.schedule), uniform_times(teacher.schedule, 2), table["c"], "euler"
    )  # fmt: skip
    torch.testing.assert_close(table["x0"], reached, atol=1e-5, rtol=1e-5)
    assert set(table["c"].tolist()) == {0, 1}
    assert abs(float(table["z"].mean())) < 0.3
    assert 0.8 < float(table["z"].std()) < 1.2


def test_the_same_pool_twice_adds_nothing_and_other_settings_are_another_pool(tmp_path: Path) -> None:
    first, again = made(tmp_path), made(tmp_path)
    assert (first.made, again.made, first.digest) == (100, 0, again.digest)
    assert all(torch.equal(first.table[name], again.table[name]) for name in ("z", "x0"))
    assert rows(tmp_path, "SELECT count(*) FROM pair_chunks") == [(1,)]
    others = [
        made(tmp_path, version="other"), made(tmp_path, sampling=Sampling(steps=3, solver="euler")),
        made(tmp_path, sampling=Sampling(steps=2, solver="ddim")),
        made(tmp_path, sampling=Sampling(steps=2, solver="euler", seed=1)),
        made(tmp_path, sampling=Sampling(steps=2, solver="euler", precision="float16")),
    ]  # fmt: skip
    assert [one.made for one in others] == [100] * 5
    assert rows(tmp_path, "SELECT count(DISTINCT chunk_id) FROM pair_chunks") == [(6,)]


def test_a_larger_pool_begins_with_the_smaller_and_chunks_have_noise_of_their_own(tmp_path: Path) -> None:
    small, large = made(tmp_path), made(tmp_path, num=CHUNK + 50)
    assert large.made == 50
    assert torch.equal(large.table["x0"][:100], small.table["x0"])
    assert not torch.equal(large.table["z"][CHUNK:], large.table["z"][:50])
    assert made(tmp_path, num=CHUNK + 50).digest == large.digest != small.digest


def test_what_was_made_before_a_stop_is_kept_and_the_pool_equals_an_undisturbed_one(tmp_path: Path) -> None:
    def stop_at_the_second(text: str) -> None:
        if text.startswith("pairs 1,025"):
            raise KeyboardInterrupt

    (tmp_path / "cut").mkdir()
    with Store(tmp_path / "cut" / "s.duckdb"):
        pass
    with pytest.raises(KeyboardInterrupt):
        supply(tmp_path / "cut" / "s.duckdb", gauss8(), "v", (2,), 2 * CHUNK, FAST, say=stop_at_the_second)
    assert rows(tmp_path / "cut", "SELECT chunk FROM pair_chunks") == [(0,)]
    (tmp_path / "whole").mkdir()
    resumed, whole = made(tmp_path / "cut", num=2 * CHUNK), made(tmp_path / "whole", num=2 * CHUNK)
    assert (resumed.made, whole.made) == (CHUNK, 2 * CHUNK)
    assert resumed.digest == whole.digest


def test_half_precision_halves_the_bytes_and_keeps_three_digits(tmp_path: Path) -> None:
    full, half = made(tmp_path), made(tmp_path, sampling=Sampling(steps=2, solver="euler", precision="float16"))
    sizes = rows(tmp_path, "SELECT octet_length(x0) FROM pair_chunks ORDER BY 1")
    assert sizes == [(2 * 2 * CHUNK,), (4 * 2 * CHUNK,)]
    assert half.table["x0"].dtype == torch.float32
    torch.testing.assert_close(half.table["x0"], full.table["x0"], atol=2e-3, rtol=1e-3)


def test_guidance_is_the_samplers_and_needs_classes(tmp_path: Path) -> None:
    plain = made(tmp_path, num_classes=2)
    guided = made(tmp_path, sampling=Sampling(steps=2, solver="euler", guidance=3.0), num_classes=2)
    assert torch.equal(plain.table["z"], guided.table["z"])
    assert not torch.allclose(plain.table["x0"], guided.table["x0"])
    with pytest.raises(InputError, match=r"guidance of 3\.0 needs a teacher with classes"):
        made(tmp_path, sampling=Sampling(guidance=3.0))
