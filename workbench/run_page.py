"""One or several training runs as one self-contained HTML page: curves, pictures, measures, evaluations, lineage.

Whatever the store holds is data: all of it is escaped, the page has no script, and a content policy lets it fetch
nothing.

Verified by: tests/workbench/test_runs.py.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from workbench.evals.html_page import document, facts, table
from workbench.evals.svg_axes import short
from workbench.evals.svg_lines import NUM_BUCKETS, NUM_COLOURS, STYLE, Curve, plot
from workbench.run_list import SHORT, describe, flat, runs, text
from workbench.train_rows import EVALUATION

MAX_PICTURE_BYTES = 16 * 2**20
_PNG = b"\x89PNG\r\n\x1a\n"

_STYLE = f"""{STYLE}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr));gap:18px}}
figure{{margin:0}}figcaption{{font-size:12px;color:var(--dim);overflow-wrap:anywhere}}
svg.k{{width:20px;height:8px;margin-right:5px;vertical-align:middle}}.key{{margin-right:14px;white-space:nowrap}}
img{{max-width:100%;height:auto;image-rendering:pixelated}}pre{{font-size:12px;overflow-x:auto}}
.words td{{white-space:normal;overflow-wrap:anywhere}}.words td+td,.words th+th{{text-align:left}}
summary{{cursor:pointer;font-size:13px;color:var(--dim)}}
"""

_READING = f"""
<h2>How to read this</h2><ul>
<li>Curves: steps count from the start of the run; phases follow each other, and a dotted line marks where one begins. A
curve of more than {2 * NUM_BUCKETS} values is cut into {NUM_BUCKETS} equal pieces: the line is their means, the pale
one behind it goes through the lowest and the highest value of each, so every peak is there. Shorter curves are drawn as
they are; nothing else is smoothed. The table of numbers is of all values.</li>
<li>An axis is logarithmic, and says so, where all values are above 0 and the highest is at least 30 times the lowest. A
triangle at the foot of a plot: a value there was infinite (or beyond 1e100) or not a number.</li>
<li>Evaluations: a sample that could not be judged counts 0 in the score and not at all in the mean of the graded.
Intervals are 95 %: Wilson's where each task is right or wrong once, else a bootstrap over tasks.</li>
<li>Times are UTC.</li></ul>"""


def page(con: duckdb.DuckDBPyConnection, run_ids: Sequence[str], command: str) -> str:
    """The whole file. Args: run_ids: whole ids, each once; command: reproduces it.

    Raises: NotFound.
    """
    found = [describe(con, run_id) for run_id in run_ids]
    listed = {row["run_id"]: row for row in runs(con, run_ids)}
    pictures = "".join(_pictures(number, run) for number, run in enumerate(found))
    parts = [
        f"<p>Made by <code>{escape(command)}</code></p>",
        _runs([listed[run["run_id"]] for run in found], found),
        f"<h2>Samples</h2><div class=charts>{pictures}</div>" if pictures else "",
        _measures(found), _evaluations(found), _curves(con, found), _settings(found),
        "<h2>Lineage</h2>", *(_lineage(number, run) for number, run in enumerate(found)), _READING,
    ]  # fmt: skip
    title = "Run" if len(found) == 1 else "Runs"
    title += " " + ", ".join(f"{run['method']} {run['run_id'][:SHORT]}" for run in found)
    return document(title, "".join(parts), _STYLE, has_pictures=True)


def write(path: Path, text: str) -> None:
    """The page, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", "replace"))
    partial.replace(path)


# --- runs, pictures, measures -----------------------------------------------------------------------------------------


def _key(number: int, run: Mapping[str, Any]) -> str:
    """A line in the run's colour, its method and the beginning of its id."""
    dashes = f' stroke-dasharray="{2 + 2 * (number // NUM_COLOURS)} 2"' if number >= NUM_COLOURS else ""
    line = f'<line class="s{number % NUM_COLOURS}" x1="0" y1="4" x2="20" y2="4" stroke-width="3"{dashes}/>'
    return f'<svg class="k" viewBox="0 0 20 8" aria-hidden="true">{line}</svg>{escape(_name(run))}'


def _name(run: Mapping[str, Any]) -> str:
    return f"{run['method']} {run['run_id'][:SHORT]}"


def _runs(listed: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    heads = ["run", "status", "began", "ended", "steps", "last loss", "headline", "id"]
    rows = []
    for number, row in enumerate(listed):
        headline = row["headline"]
        cells = [_key(number, row), escape(row["status"]), _time(row["created_at"]), _time(row["ended_at"])]
        cells += [f"{row['steps']:,}", _value(row["loss"])]
        cells += [f"{_value(headline['value'])}<span class=i>{escape(headline['name'])}</span>" if headline else "–"]
        rows.append(("", [*cells, f"<code>{escape(row['run_id'])}</code>"]))
    errors = [f"<p class=bad>{escape(_name(run))}: {escape(run['error'])}</p>" for run in found if run["error"]]
    return table(heads, rows) + "".join(errors)


def _time(iso: str | None) -> str:
    return iso[:16].replace("T", " ") if iso else "–"


def _value(value: float | None) -> str:
    return "–" if value is None else short(value)


def _pictures(number: int, run: Mapping[str, Any]) -> str:
    found = []
    for artifact in run["artifacts"]:
        path = Path(artifact["path"])
        if path.suffix.lower() != ".png":
            continue
        what = f"{_key(number, run)}: {escape(artifact['kind'])}"
        image = _read_png(path)
        if isinstance(image, str):
            found.append(f"<figure><figcaption>{what}: <span class=bad>{escape(image)}</span></figcaption></figure>")
            continue
        panels = _panels(run) if artifact["kind"] == "samples" else ""
        width, height = struct.unpack(">II", image[16:24])
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        alt = escape(f"{artifact['kind']} of {_name(run)}")
        found.append(
            f'<figure><img src="{source}" width="{width}" height="{height}" alt="{alt}">'
            f"<figcaption>{what}{panels}</figcaption></figure>"
        )
    return "".join(found)


def _read_png(path: Path) -> bytes | str:
    """The file, or why it is not shown."""
    try:
        size = path.stat().st_size
        if size > MAX_PICTURE_BYTES:
            return f"{path} has {size / 2**20:.0f} MiB; up to {MAX_PICTURE_BYTES >> 20} are shown."
        image = path.read_bytes()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    return image if image.startswith(_PNG) and len(image) > 24 else f"{path} is no PNG file."


def _panels(run: Mapping[str, Any]) -> str:
    """What stands side by side in a generator's picture: `loop_measures` measures in the order in which it draws."""
    names = [row["name"].partition("/")[0] for row in run["metrics"] if row["phase"] == EVALUATION]
    panels = [name for name in dict.fromkeys(names) if "@" in name]
    return f"<br>from left to right, with the number of sampling steps: {escape(', '.join(panels))}" if panels else ""


def _measures(found: Sequence[Mapping[str, Any]]) -> str:
    """What was measured when a run had ended, a column for each run."""
    values: dict[str, dict[str, str]] = {}
    for run in found:
        for row in run["metrics"]:
            if row["phase"] == EVALUATION:
                shown = "<span class=bad>not finite</span>" if row["not_finite"] else _value(row["last"])
                values.setdefault(row["name"], {})[run["run_id"]] = shown
    if not values:
        return ""
    heads = ["measure", *(_key(number, run) for number, run in enumerate(found))]
    rows = [("", [escape(name), *(cells.get(run["run_id"], "–") for run in found)]) for name, cells in values.items()]
    return f"<h2>Measured when the run had ended</h2>{table(heads, rows)}"


def _evaluations(found: Sequence[Mapping[str, Any]]) -> str:
    heads = ["run", "tasks", "grader", "answers", "statuses", "score", "mean of the graded", "began", "id"]
    rows = []
    for number, run in enumerate(found):
        for one in run["evaluations"]:
            score = one["score_all"]
            between = (
                f"<span class=i>{score['low']:.3f} … {score['high']:.3f}</span>" if score["low"] is not None else ""
            )
            counts = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in one["by_status"].items())
            cells = [_key(number, run), escape(f"{one['task_set']} ({one['split']})"), escape(one["grader"])]
            cells += [f"{one['num']:,}", escape(counts), f"{score['estimate']:.3f}{between}"]
            cells += ["–" if one["score"] is None else f"{one['score']:.3f}", _time(one["created_at"])]
            rows.append(("", [*cells, f"<code>{escape(one['eval_id'])}</code>"]))
    if not rows and any(row["phase"] == EVALUATION for run in found for row in run["metrics"]):
        return ""  # generators and classifiers are measured by their run, not on benches
    none = "<p>None in the store yet: <code>workbench eval bench --model FOLDER</code> makes them.</p>"
    return f"<h2>Evaluations of the trained models</h2>{table(heads, rows) if rows else none}"


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(con: duckdb.DuckDBPyConnection, found: Sequence[Mapping[str, Any]]) -> str:
    """A plot for each metric that has several values in a phase, and the numbers of all metrics."""
    names = dict.fromkeys(row["name"] for run in found for row in run["metrics"] if row["num"] > 1)
    plots = []
    for name in names:
        curves = [curve for number, run in enumerate(found) for curve in _parts(con, number, run, name)]
        marks = _marks(found[0], name) if len(found) == 1 else []
        drawn = sorted({curve.colour for curve in curves}) if len(found) > 1 else []
        keys = "".join(f"<span class=key>{_key(number, found[number])}</span>" for number in drawn)
        plots.append(f"<figure>{plot(curves, name, marks)}<figcaption>{keys}</figcaption></figure>")
    shown = f"<div class=charts>{''.join(plots)}</div>" if plots else "<p>No metric has more than one value yet.</p>"
    return f"<h2>Curves</h2>{shown}{_numbers(found)}"


def _starts(run: Mapping[str, Any]) -> dict[str, int]:
    """How many steps of the run lie before each of its phases."""
    lengths: dict[str, int] = {}
    for row in run["metrics"]:
        lengths[row["phase"]] = max(lengths.get(row["phase"], 0), row["last_step"])
    starts, before = {}, 0
    for phase, length in lengths.items():
        starts[phase] = before
        before += length
    return starts


def _parts(
    con: duckdb.DuckDBPyConnection, number: int, run: Mapping[str, Any], name: str
) -> Iterator[Curve]:  # fmt: skip
    """The metric's curve in each phase in which it has several values."""
    starts = _starts(run)
    for row in run["metrics"]:
        if row["name"] == name and row["num"] > 1:
            values = con.execute(
                "SELECT step, value FROM metrics WHERE run_id = ? AND phase = ? AND name = ? ORDER BY step, rowid",
                [run["run_id"], row["phase"], name],
            ).fetchnumpy()
            steps = np.asarray(values["step"], np.float64) + starts[row["phase"]]
            yield Curve(f"{_name(run)}, {row['phase']}", number, steps, np.asarray(values["value"], np.float64))


def _marks(run: Mapping[str, Any], name: str) -> list[tuple[float, str]]:
    """Where the phases begin in which the metric has a curve, if there are several phases."""
    starts = _starts(run)
    phases = [row["phase"] for row in run["metrics"] if row["name"] == name and row["num"] > 1]
    return [(starts[phase], phase) for phase in phases] if len(starts) > 1 else []


def _numbers(found: Sequence[Mapping[str, Any]]) -> str:
    heads = ["metric", "phase", "run", "values", "first", "last", "lowest", "highest", "not finite"]
    rows = []
    for number, run in enumerate(found):
        for row in run["metrics"]:
            if row["phase"] != EVALUATION:
                cells = [escape(row["name"]), escape(row["phase"]), _key(number, run), f"{row['num']:,}"]
                cells += [_value(row["first"]), _value(row["last"])]
                cells += [
                    f"{_value(row[end])}<span class=i>step {row[f'{end}_at']:,}</span>" if row[end] is not None else "–"
                    for end in ("lowest", "highest")
                ]
                bad = row["not_finite"]
                rows.append((row["name"], [*cells, f"<span class=bad>{bad:,}</span>" if bad else "0"]))
    order = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in rows))}
    ordered = [("", cells) for _, cells in sorted(rows, key=lambda row: order[row[0]])]
    return f"<details><summary>Numbers of all metrics</summary>{table(heads, ordered)}</details>"


# --- settings and lineage ---------------------------------------------------------------------------------------------


def _settings(found: Sequence[Mapping[str, Any]]) -> str:
    parts = ["<h2>Settings</h2>"]
    if len(found) > 1:
        given = [
            dict(flat({**run["recipe"], "lineage": run["lineage"], "code": run["code_version"], **run["packages"]}))
            for run in found
        ]
        names = dict.fromkeys(name for one in given for name in one)
        rows = [
            ("", [escape(name), *(escape(one.get(name, "–")) for one in given)])
            for name in names
            if len({one.get(name) for one in given}) > 1
        ]
        heads = ["differs", *(_key(number, run) for number, run in enumerate(found))]
        parts.append(f"<div class=words>{table(heads, rows)}</div>" if rows else "<p>All settings are equal.</p>")
    for number, run in enumerate(found):
        recipe = escape(json.dumps(run["recipe"], indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{_key(number, run)}: the whole recipe</summary><pre>{recipe}</pre></details>")
    return "".join(parts)


def _lineage(number: int, run: Mapping[str, Any]) -> str:
    """Tables of what the run was made from, whatever its engine noted, and of what it left."""
    noted = dict(run["lineage"])
    models = {"student": noted.pop("student", None), **(noted.pop("models", None) or {})}
    parts = [f"<h3>{_key(number, run)}</h3>"]
    parts.append(
        _of_rows("models", [{"role": name, **one} for name, one in models.items() if isinstance(one, Mapping)])
    )
    for name, value in noted.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            parts.append(_of_rows(name, value))
        elif isinstance(value, Mapping) and value and all(isinstance(one, Mapping) for one in value.values()):
            parts.append(_of_rows(name, [{"name": key, **one} for key, one in value.items()]))
        elif isinstance(value, Mapping) and value:
            parts.append(_of_rows(name, [value]))
        else:
            parts.append(f"<p>{escape(name)}: {escape(text(value)) if value else 'none'}</p>")
    parts.append(_of_rows("artifacts", run["artifacts"]))
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    return "".join(parts) + facts({"code": run["code_version"], "packages": packages, "folder": run["folder"]})


def _of_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a column for each key; the first column's head names the table."""
    if not rows:
        return f"<p>{escape(name)}: none</p>"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [("", [escape(text(row[key])) if key in row else "–" for key in keys]) for row in rows]
    heads = [f"{escape(name)}: {escape(keys[0])}", *(escape(key) for key in keys[1:])]
    return f"<div class=words>{table(heads, cells)}</div>"
