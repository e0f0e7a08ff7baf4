"""`workbench runs`: the list, one run, and the page: nothing lost, nothing fetched, nothing of a recipe run."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from workbench import png
from workbench.cli import app
from workbench.data.store import Store
from workbench.evals.svg_lines import NUM_BUCKETS
from workbench.train_rows import Tracker

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" ' & \u2028"
LM, LOOP, BAD = "aaaa1111000000000000", "aaaa2222000000000000", "cccc3333000000000000"
MODEL = {"version": "weights-0", "vocabulary": "words-0", "source": "new (hidden 16)"}
Metrics = Sequence[tuple[str, int, Mapping[str, float]]]


def add(
    store: Path, run_id: str, method: str, metrics: Metrics, *, recipe: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None, end: str | None = "done", error: str | None = None,
    artifacts: Mapping[str, tuple[Path, str]] | None = None,
) -> None:  # fmt: skip
    """A run as `workbench train` writes it."""
    rows = Tracker(store, run_id, lambda _: None)
    rows.begin(method, recipe or {}, lineage or {}, "0.1+code", {"python": "3.11"}, store.parent / run_id)
    for phase, step, numbers in metrics:
        rows.on_metrics(phase, step, numbers)
    rows.end(end or "running", error, artifacts)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases with evaluations, a generator with pictures, and one that failed."""
    tmp_path = tmp_path_factory.mktemp("runs")
    path, picture = tmp_path / "s.duckdb", tmp_path / "samples.png"
    png.write(picture, np.arange(48, dtype=np.uint8).reshape(6, 8))
    (tmp_path / "other.png").write_bytes(b"GIF89a")
    add(
        path, LM, "soda",
        [*(("warm-up", step, {"loss": 3.0 - step / 10, "grad_norm": 10.0 ** (step % 4)}) for step in range(1, 11)),
         *(("preference", step, {"loss": 0.7 - step / 100, "learning_rate": 0.0}) for step in range(1, 21)),
         ("preference", 20, {"train_runtime": 2.5})],
        recipe={"method": "soda", "settings": {"steps": 30, "seed": 0}, "note": EVIL, "tag": "[/x] [red]"},
        lineage={"student": MODEL, "models": {"teacher": {**MODEL, "source": EVIL}},
                 "tasks": {"set": "rooms", "count": 8},
                 "rollouts": [{"policy": "teacher", "num": 8, "versions": ["v1", "v2"]}, {"policy": "base", "num": 4}],
                 "scores": []},
        artifacts={"model": (tmp_path / LM / "model", "weights-1")},
    )  # fmt: skip
    add(
        path, LOOP, "dmd2",
        [*(("distil", step, {"loss": 1.0 / step}) for step in range(1, 11)),
         ("evaluation", 10, {"teacher@1/energy": 0.9, "teacher@50/energy": 0.1, "student@1/energy": 0.125})],
        recipe={"method": "dmd2", "settings": {"steps": 10, "seed": 0}},
        lineage={"student": MODEL, "models": {}, "data": {"name": "digits", "shape": [1, 8, 8]}, "pools": []},
        artifacts={"samples": (picture, "p"), "picture": (tmp_path / "gone.png", "q"),
                   "map": (tmp_path / "other.png", "r")},
    )  # fmt: skip
    add(path, BAD, EVIL, [("distil", 1, {EVIL: 1.0, "loss": float("nan")}), ("distil", 2, {EVIL: 2.0, "loss": 2.0})],
        end="failed", error=f"ValueError: {EVIL}")  # fmt: skip
    with Store(path) as opened, opened.transaction() as con:
        for eval_id, version, when in (("e-old", "weights-1", 1), ("e-new", "other", 2)):
            con.execute(
                "INSERT INTO eval_benches VALUES (?, 'rooms', 'test', 'd', 'm', ?, '{}', 'reward/1', ?, "
                "make_timestamptz(?::BIGINT))",
                [eval_id, version, LM if eval_id == "e-new" else None, when * 1_000_000],
            )
            for task, score in enumerate((1.0, 0.0, 1.0, None) if eval_id == "e-new" else (1.0,)):
                status = "ok" if score is not None else "policy_error"
                con.execute(
                    "INSERT INTO evaluations VALUES (?, ?, 0, ?, ?, '', NULL, 'reward/1', 1, 0.0, NULL)",
                    [eval_id, f"t{task}", status, score],
                )
        for number, run_id in enumerate((LM, LOOP, BAD)):
            con.execute(
                "UPDATE runs SET created_at = make_timestamptz(?::BIGINT) WHERE run_id = ?",
                [1_790_000_000_000_000 + number * 60_000_000, run_id],
            )
    return path


def cli(store: Path, *arguments: object) -> int:
    return app.run(["--store", str(store), "runs", *map(str, arguments)])


def told(store: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert cli(store, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


class Seen(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(store: Path, *ids: str) -> str:
    out = store.parent / "page.html"
    assert cli(store, "page", *ids, "--out", out) == 0
    return out.read_text("utf-8")


def plots(page: str) -> dict[str, ElementTree.Element]:
    """The plots by the text of their axis."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg viewBox="0 0 560.*?</svg>', page, re.DOTALL)]
    return {[t.text or "" for t in root.findall("text") if t.get("class") == "a"][1]: root for root in found}


def test_the_list_says_what_each_run_did(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(store, capsys, "list")
    assert [row["run_id"] for row in rows] == [BAD, LOOP, LM]
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert [row["steps"] for row in rows] == [2, 10, 30]
    assert [row["loss"] for row in rows] == pytest.approx([2.0, 0.1, 0.5])
    assert [row["headline"] for row in rows] == [
        None, {"name": "student@1/energy", "value": 0.125}, {"name": "rooms test", "value": 0.5},
    ]  # fmt: skip
    assert rows[2]["created_at"] == "2026-09-21T14:13:20Z"
    assert cli(store, "list") == 0
    out = capsys.readouterr().out
    assert all(run_id[:8] in out for run_id in (LM, LOOP, BAD))
    assert "0.125" in out


def test_one_run_is_told_in_full(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(store, capsys, "show", "aaaa1")
    assert found["run_id"] == LM
    assert found["recipe"]["note"] == EVIL
    assert found["lineage"]["models"]["teacher"]["source"] == EVIL
    by_name = {(row["phase"], row["name"]): row for row in found["metrics"]}
    assert list(by_name) == [
        ("warm-up", "loss"), ("warm-up", "grad_norm"), ("preference", "loss"), ("preference", "learning_rate"),
        ("preference", "train_runtime"),
    ]  # fmt: skip
    loss = by_name["warm-up", "loss"]
    assert (loss["num"], loss["first"], loss["lowest_at"], loss["highest_at"]) == (10, pytest.approx(2.9), 10, 1)
    assert {one["eval_id"]: one["num"] for one in found["evaluations"]} == {"e-old": 1, "e-new": 4}
    newest = next(one for one in found["evaluations"] if one["eval_id"] == "e-new")
    assert newest["by_status"] == {"ok": 3, "policy_error": 1}
    assert (newest["score"], newest["score_all"]["estimate"]) == (pytest.approx(2 / 3), 0.5)
    assert newest["score_all"]["low"] < 0.5 < newest["score_all"]["high"]
    failed = told(store, capsys, "show", BAD)
    loss = next(row for row in failed["metrics"] if row["name"] == "loss")
    assert (loss["num"], loss["not_finite"], loss["first"], loss["last"]) == (2, 1, 2.0, 2.0)
    assert cli(store, "show", LM) == 0
    out = capsys.readouterr().out
    for expected in ("settings.steps", "rollouts.1.policy", "warm-up: loss", "0.500 [", "e-new", "[/x] [red]"):
        assert expected in out


@pytest.mark.parametrize(
    ("prefix", "code", "expected"),
    [("aaaa", 2, f"2 runs' ids begin with 'aaaa': {LOOP} (dmd2, done), {LM} (soda, done)"),
     ("aaaa1119", 4, f"No run's id begins with 'aaaa1119'. Nearest: {LM}"), ("", 2, "3 runs")],
)  # fmt: skip
def test_a_prefix_that_is_not_one_run_is_refused(
    store: Path, capsys: pytest.CaptureFixture[str], prefix: str, code: int, expected: str
) -> None:
    for arguments in (("show", prefix), ("page", LM, prefix, "--out", store.parent / "never.html")):
        assert cli(store, *arguments) == code
        assert expected in capsys.readouterr().err
    assert not (store.parent / "never.html").exists()


def test_a_store_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path / "s.duckdb").close()
    assert cli(tmp_path / "s.duckdb", "list") == 0
    assert "no runs yet" in capsys.readouterr().out
    assert told(tmp_path / "s.duckdb", capsys, "list") == []
    assert cli(tmp_path / "s.duckdb", "show", "a") == 4
    assert cli(tmp_path / "none.duckdb", "list") == 16


def test_the_page_holds_no_code_of_anybody_and_fetches_nothing(store: Path) -> None:
    text = page_of(store, LM, LOOP, BAD)
    seen = Seen(text)
    assert "script" not in {tag for tag, _ in seen.tags}
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert not [tag for tag, attributes in seen.tags if attributes.get("href")]
    sources = [attributes["src"] or "" for _, attributes in seen.tags if "src" in attributes]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    policy = next(a["content"] or "" for tag, a in seen.tags if tag == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    shown = "".join(seen.text)
    assert shown.count(EVIL) >= 4  # method, error, metric, source of the teacher
    assert json.dumps(EVIL, ensure_ascii=False)[1:-1] in shown  # in the recipe


def test_pictures_are_embedded_whole_and_a_lost_one_is_told(store: Path) -> None:
    text = page_of(store, LOOP)
    (source,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert base64.b64decode(source) == (store.parent / "samples.png").read_bytes()
    assert 'width="8" height="6"' in text
    assert "teacher@1, teacher@50, student@1" in text
    assert "gone.png cannot be read: No such file or directory." in text
    assert "other.png is no PNG file" in text


def test_phases_follow_each_other_and_runs_lie_over_each_other(store: Path) -> None:
    one = plots(page_of(store, LM))
    assert list(one) == ["loss", "grad_norm (logarithmic)", "learning_rate"]
    lines = one["loss"].findall("polyline")
    assert [line.findtext("title") for line in lines] == ["soda aaaa1111, warm-up", "soda aaaa1111, preference"]
    ends = [[float(corner.split(",")[0]) for corner in (line.get("points") or "").split()] for line in lines]
    assert [len(end) for end in ends] == [10, 20]
    width = (560 - 60 - 16) / 30
    assert (ends[0][0], ends[0][-1]) == pytest.approx((60 + width, 60 + 10 * width), abs=0.1)
    assert (ends[1][0], ends[1][-1]) == pytest.approx((60 + 11 * width, 60 + 30 * width), abs=0.1)
    assert [t.text for t in one["loss"].findall("text") if t.get("class") == "h"] == ["warm-up", "preference"]
    both = plots(page_of(store, LM, LOOP))["loss"]
    assert [line.get("class") for line in both.findall("polyline")] == ["s0 c", "s0 c", "s1 c"]
    bad = plots(page_of(store, BAD))["loss"]
    assert (len(bad.findall("polygon")), len(bad.findall("circle"))) == (1, 1)


def test_tables_hold_measures_evaluations_and_only_settings_that_differ(store: Path) -> None:
    text = page_of(store, LM, LOOP)
    rows = ["".join(Seen(row).text) for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)]
    assert any(row.startswith("student@1/energy") and "0.125" in row for row in rows)
    assert any("rooms (test)" in row and "3 ok, 1 policy error" in row and "0.500" in row for row in rows)
    assert "settings.steps3010" in rows
    assert not any(row.startswith("settings.seed") for row in rows)
    assert any(row.startswith("teacher") and '["v1", "v2"]' in row for row in rows)
    assert "data: namedigits" not in rows
    assert any(row == "digits[1, 8, 8]" for row in rows)
    assert "scores: none" in "".join(Seen(text).text)


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, num = tmp_path / "s.duckdb", 20_000
    losses = [2.0 + (step % 5) / 10 for step in range(num)]
    losses[12_345] = 7.0
    add(path, LM, "gkd", [("distil", step, {"loss": loss}) for step, loss in enumerate(losses, 1)])
    text = page_of(path, LM)
    capsys.readouterr()
    assert len(text) < 60_000
    line, _ = plots(text)["loss"].findall("polyline")
    heights = [float(corner.split(",")[1]) for corner in (line.get("points") or "").split()]
    assert len(heights) <= 2 * NUM_BUCKETS + 2
    assert min(heights) < min(sorted(heights)[1:]) - 100
    assert f"more than {2 * NUM_BUCKETS} values is cut into {NUM_BUCKETS} equal pieces" in text
    assert "20,000" in text
    (row,) = told(path, capsys, "show", "a")["metrics"]
    assert (row["highest"], row["highest_at"], row["num"]) == (7.0, 12_346, num)


def test_the_page_needs_a_folder_and_takes_a_run_once(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(store, "page", LM, "--out", store.parent / "none" / "p.html") == 2
    assert "does not exist" in capsys.readouterr().err
    assert told(store, capsys, "page", LM, "aaaa1", "--out", store.parent / "p.html")["runs"] == [LM]
    assert page_of(store, LM) == page_of(store, LM)
