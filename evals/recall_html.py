"""The recall report as one self-contained HTML file: tables, plots, and a viewer for single queries.

Texts of logs and documents are data: they are escaped in the tables, enter the viewer by textContent, and a content
policy lets only our own script run and nothing be fetched.

Verified by: tests/evals/test_recall_report.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from workbench.evals.html_page import document, facts, table
from workbench.evals.recall_report import Options, Section, unit_of
from workbench.evals.recall_scores import COMPARED, SHOWN
from workbench.evals.recall_svg import Point, scatter
from workbench.evals.recall_viewer import SCRIPT, STYLE

_METHOD = """
<h2>How to read this</h2><ul>
<li>Order of hits: descending score, equal scores by ascending id. "Tied" counts queries in which equal scores of a
relevant and another document are decided by id alone; "empty" those for which nothing came back.</li>
<li>A query that failed counts 0; where any failed, the mean over the completed ones stands beside it.</li>
<li>Intervals are 95 % percentile bootstraps of 10,000 resamples or more, widened for few units as t is for z; where
the task has clusters (conversations, sessions), whole clusters are resampled. Where all queries score 0, or all 1,
Wilson's interval over them (or over the clusters). p: sign flips of clusters (of queries where there are none), 10,000
patterns, two-sided, seeded. With n clusters no p is below 2 / 2<sup>n</sup>: few clusters cannot show much.</li>
<li>Corrected: Bonferroni interval over all comparisons of the table. Detectable: the smallest mean difference that so
many queries show with power 0.8 at the corrected level, were they independent; less than it may be there unseen.</li>
<li>Compression: tokens of the hits' documents over tokens returned for them. Index: bytes with the texts that it
returns; for the workbench's own, rows before compression.</li>
<li>A p above 0.05 says that no difference was seen, not that there is none.</li>
</ul>"""


def html(sections: Sequence[Section], options: Options) -> str:
    """The whole file."""
    body = "".join(_task(section, number, options) for number, section in enumerate(sections))
    title = "Recall: " + ", ".join(section.summary["task"] for section in sections)
    body = f"<p>Made by <code>{escape(options.command)}</code></p>{body}{_METHOD}"
    return document(title, body, STYLE, SCRIPT)


def embedded(value: Any) -> str:
    """JSON that no text in it can end: without <, > and & and the line ends of JavaScript."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _task(section: Section, number: int, options: Options) -> str:
    summary = section.summary
    parts = [f"<h2>{escape(summary['task'])}</h2>", _facts(summary)]
    if summary["runs"]:
        parts += ["<h3>Results</h3>", _results(summary)]
    if summary["not_run"]:
        rows = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in summary["not_run"].items())
        parts.append(f"<h3>Not run</h3><ul>{rows}</ul>")
    if summary["runs"]:
        parts.append("<h3>Tokens returned against quality</h3>")
        parts += [_frontier(summary, comparison) for comparison in summary["comparisons"]]
        parts += [_categories(summary)] if summary["categories"] else []
        parts += [_comparison(comparison) for comparison in summary["comparisons"] if comparison["rows"]]
        parts += [_times(summary)] if options.times else []
        parts.append(f"<h3>Query by query</h3><p class=dim>{_shown(section)}</p><div id=view-{number}>")
        parts.append(f'</div><script type="application/json" data-view="view-{number}">{embedded(section.drill)}')
        parts.append("</script>")
    return "".join(parts)


def _shown(section: Section) -> str:
    shown, total = len(section.drill["runs"]), len(section.summary["runs"])
    which = "All" if shown == total else f"The baselines and the best by nDCG@10, {shown} of {total}"
    return f"{which} configurations; the first {SHOWN} hits. Words are compared as the tokenizer stem/1 reads them."


def _facts(summary: dict[str, Any]) -> str:
    notes = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in summary["notes"].items())
    packages = ", ".join(f"{name} {version}" for name, version in summary["packages"].items())
    budget = f"; lists cut at {summary['budget']} returned tokens" if summary["budget"] is not None else ""
    asked = f"{summary['num_queries']} queries of the split “{summary['split']}”, {summary['num_scored']} scored"
    rows = {
        "asked": f"{asked}; {summary['k']} hits each{budget}",
        "documents": f"{summary['num_documents']} in {summary['num_scopes']} scope(s)",
        "data": f"{summary['task']} version {summary['version']}, SHA-256 {summary['fingerprint']}",
        "licence": summary["licence"] or "not stated",
        "left out or repaired": notes or "nothing",
        "code": summary["code_version"],
        "packages": packages,
    }
    return facts(rows)


def _interval(low: float, high: float, signed: bool = False) -> str:
    return (
        f"<span class=i>{low:+.3f} … {high:+.3f}</span>" if signed else f"<span class=i>{low:.3f} … {high:.3f}</span>"
    )


def _results(summary: dict[str, Any]) -> str:
    baselines = {comparison["baseline"] for comparison in summary["comparisons"]}
    counted = "tokens within budget" if summary["budget"] is not None else f"tokens of {SHOWN} hits"
    heads = ["configuration", *summary["metrics"], counted, "compression", "index MB", "failed", "empty", "tied"]
    rows = []
    for run in summary["runs"]:
        failed = sum(count for status, count in run["statuses"].items() if status != "ok")
        text = "verbatim text" if run["is_verbatim"] else "compact text"
        cells = [f"{escape(run['name'])}<span class=i>{text}</span>"]
        for metric in run["metrics"].values():
            completed = (
                f"<span class=i>completed {metric['completed']:.3f}</span>" if metric["completed"] is not None else ""
            )
            extra = (completed or "<span class=i>none completed</span>") if failed else ""
            cells.append(f"{metric['mean']:.3f}{_interval(metric['low'], metric['high'])}{extra}")
        ratio = "–" if run["compression"] is None else f"{run['compression']:.2f}x"
        kinds = ", ".join(f"{count} {status}" for status, count in run["statuses"].items() if status != "ok")
        error = f'<span class="bad" title="{escape(run["first_error"] or "")}">{kinds}</span>' if failed else "0"
        cells += [f"{run['tokens']:,.0f}", ratio, f"{run['index_bytes'] / 1e6:.2f}", error]
        cells += [str(run["num_empty"]), str(run["num_tied"])]
        rows.append(("base" if run["name"] in baselines else "", cells))
    failures = [run for run in summary["runs"] if run["first_error"]]
    told = "".join(f"<li class=bad>{escape(r['name'])}: {escape(r['first_error'])}</li>" for r in failures)
    lost = "".join(
        f"<li class=bad>{escape(run['name'])}: {run['num_unindexed']} documents could not be indexed</li>"
        for run in summary["runs"]
        if run["num_unindexed"]
    )
    failed_first = f"<p>First failure of each:</p><ul>{told}</ul>" if told else ""
    return table(heads, rows) + failed_first + (f"<ul>{lost}</ul>" if lost else "")


def _frontier(summary: dict[str, Any], comparison: dict[str, Any]) -> str:
    metric = comparison["metric"]
    counted = "within the budget" if summary["budget"] is not None else f"of {SHOWN} hits"
    points = [
        Point(run["name"], run["tokens"], run["metrics"][metric]["mean"], run["name"] == comparison["baseline"])
        for run in summary["runs"]
    ]
    return scatter(
        points, f"tokens {counted}, mean (logarithmic)", f"{metric}, mean of {summary['num_scored']} queries"
    )


def _categories(summary: dict[str, Any]) -> str:
    parts = ["<h3>By category</h3>"]
    for metric in COMPARED:
        heads = [metric, *(f"{escape(c['category'])}<br>n = {c['num_queries']}" for c in summary["categories"])]
        rows = []
        for run in summary["runs"]:
            values = [category["runs"][run["name"]][metric] for category in summary["categories"]]
            rows.append(("", [escape(run["name"]), *(f"{value:.3f}" for value in values)]))
        parts.append(table(heads, rows))
    return "".join(parts)


def _comparison(comparison: dict[str, Any]) -> str:
    title = (
        f"<h3>{comparison['metric']} against {escape(comparison['baseline'])} ({escape(comparison['chosen'])})</h3>"
        f"<p class=dim>{comparison['num_comparisons']} comparisons; unit: {unit_of(comparison)}.</p>"
    )
    heads = ["configuration", "difference", "corrected interval", "p", "p Holm", "p Bonferroni", "p by query",
             "d<sub>z</sub>", "wins / ties / losses", "tied scores", "detectable"]  # fmt: skip
    rows = []
    for row in comparison["rows"]:
        significant = row["p_holm"] < 0.05
        kind = ("good" if row["difference"] > 0 else "bad") if significant else ""
        difference = f'<span class="{kind}">{row["difference"]:+.3f}</span>{_interval(row["low"], row["high"], True)}'
        rows.append(("", [
            escape(row["name"]), difference, f"{row['low_corrected']:+.3f} … {row['high_corrected']:+.3f}",
            _p(row["p"]), _p(row["p_holm"]), _p(row["p_bonferroni"]), _p(row["p_by_query"]),
            "–" if row["d_z"] is None else f"{row['d_z']:+.2f}", f"{row['wins']} / {row['ties']} / {row['losses']}",
            str(row["num_tied_scores"]),
            "–" if row["smallest_detectable"] is None else f"{row['smallest_detectable']:.3f}",
        ]))  # fmt: skip
    return title + table(heads, rows)


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "&lt; 0.0001"


def _times(summary: dict[str, Any]) -> str:
    rows = []
    for run in summary["runs"]:
        times = run["times"]
        made = datetime.fromtimestamp(times["created_at"] / 1e6, UTC).strftime("%Y-%m-%d %H:%M")
        cells = [escape(run["name"]), f"{times['build_seconds']:.2f}", f"{times['query_ms']:.2f}"]
        rows.append(("", [*cells, f"{times['query_ms_p95']:.2f}", made]))
    heads = ["configuration", "build, CPU s", "query, CPU ms, mean", "95th percentile", "first run (UTC)"]
    return (
        "<h3>Times on the machine that ran it</h3><p class=dim>CPU, not clock. They differ from run to run; --no-times "
        f"leaves this table out. The workbench's own configurations: as if each had built and asked alone.</p>"
        f"{table(heads, rows)}"
    )
