"""The report of a recall evaluation: one JSON-able object, from which the Markdown and the HTML are made.

Two reports over the same answers have the same bytes: what a clock says stands under "times" only and can be left out,
nothing depends on the order of rows in the store, and no moment of making is written.

Verified by: tests/evals/test_recall_report.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.evals import recall_scores
from workbench.evals.recall_run import Outcome, StorePath, code_version
from workbench.evals.recall_scores import COMPARED, METRICS, SHOWN, Answer, Scored
from workbench.evals.tasks.base import Query, RecallTask, Split
from workbench.memory.tokenizers import get_tokenizer

#: Configurations whose hits can be looked at query by query.
DRILLED = 12
_TEXT_CHARS, _QUERY_CHARS, _MISSES = 160, 400, 10
_TOKENIZER = "stem/1"
#: Why a relevant document is not among the hits that are shown; numbers in the viewer's data, texts in the viewer.
OUTRANKED, BEYOND_BUDGET, NO_SHARED_TERM, NOTHING_TO_INDEX, BELOW_K, FAILED = range(6)


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for, as far as it changes a report; `command` reproduces it."""

    split: Split
    k: int
    command: str
    budget: int | None = None
    baseline: str | None = None
    times: bool = True


@dataclass(frozen=True, slots=True)
class Section:
    """The report of one task: `summary` for programs, `drill` for the viewer."""

    summary: dict[str, Any]
    drill: dict[str, Any]


def section(path: StorePath, task: RecallTask, outcome: Outcome, options: Options) -> Section:
    """The report of one task over what is stored of these runs in the store at this path.

    Raises: InputError if a run lacks a query, or the baseline is none of the runs.
    """
    queries = task.split(options.split)
    tokens = recall_scores.tokens_of(task)
    runs = [
        recall_scores.score(recall_scores.fetch(path, run_id), task, queries, tokens, options.budget)
        for run_id in outcome.run_ids.values()
    ]
    categories = recall_scores.by_category(runs, queries) if runs else []
    comparisons = [recall_scores.compare(runs, queries, metric, options.baseline) for metric in COMPARED if runs]
    packages = {name: number for run in runs for name, number in run.packages.items()}
    summary: dict[str, Any] = {
        "task": task.name, "version": task.version, "fingerprint": task.fingerprint, "licence": task.licence,
        "notes": dict(sorted(task.notes.items())), "split": options.split, "num_queries": len(queries),
        "num_scored": len(runs[0].evaluation.query_ids) if runs else 0, "num_documents": len(task.documents),
        "num_scopes": len({document.scope for document in task.documents}), "k": options.k, "budget": options.budget,
        "metrics": list(METRICS), "code_version": code_version(), "packages": dict(sorted(packages.items())),
        "runs": [run.as_json(options.times) for run in runs], "not_run": dict(outcome.skipped),
        "categories": categories, "comparisons": comparisons,
    }  # fmt: skip
    chosen = _chosen(runs, [comparison["baseline"] for comparison in comparisons])
    return Section(summary, _drill(task, queries, chosen, options))


def _chosen(runs: Sequence[Scored], baselines: list[str]) -> list[Scored]:
    """The baselines and the best by nDCG@10, at most DRILLED, in the order of the table."""
    best = sorted(runs, key=lambda run: (run.name not in baselines, -run.intervals["ndcg@10"].estimate, run.name))
    names = {run.name for run in best[:DRILLED]}
    return [run for run in runs if run.name in names]


# --- drill-down -------------------------------------------------------------------------------------------------------


def _drill(task: RecallTask, queries: Sequence[Query], runs: Sequence[Scored], options: Options) -> dict[str, Any]:
    """Documents once, by number; for each query what every run returned first and what it missed."""
    texts = {document.id: document.text for document in task.documents}
    numbers: dict[str, int] = {}
    tokenizer = get_tokenizer(_TOKENIZER)
    terms: dict[str, set[str]] = {}

    def number(doc: str) -> int:
        return numbers.setdefault(doc, len(numbers))

    def missed(query: Query, query_terms: set[str], answer: Answer, doc: str) -> list[float]:
        if doc not in terms:
            terms[doc] = set(tokenizer(texts[doc]))
        at, shared = answer.ranks.get(doc), len(query_terms & terms[doc])
        if answer.status != "ok":
            reason, detail = FAILED, 0
        elif at is not None and at > answer.num_within:
            reason, detail = BEYOND_BUDGET, at
        elif at is not None:
            reason, detail = OUTRANKED, at
        elif not terms[doc]:
            reason, detail = NOTHING_TO_INDEX, 0
        else:
            reason, detail = (BELOW_K if shared else NO_SHARED_TERM), shared
        return [number(doc), reason, detail]

    scores = [
        dict(zip(run.evaluation.query_ids, run.evaluation.values["ndcg@10"].round(3).tolist(), strict=True))
        for run in runs
    ]
    rows = []
    for query in queries:
        query_terms = set(tokenizer(query.text))
        relevant = sorted(query.relevance.items(), key=lambda item: (-item[1], item[0]))
        answers = [run.answers[query.id] for run in runs]
        got = []
        for answer in answers:
            shown = {doc for doc, _ in answer.hits}
            absent = [doc for doc, grade in relevant if doc not in shown and grade >= task.relevant_from]
            got.append(
                {
                    "e": "" if answer.status == "ok" else f"{answer.status}: {answer.error}",
                    "h": [[number(doc), float(f"{score:.4g}")] for doc, score in answer.hits],
                    "m": [missed(query, query_terms, answer, doc) for doc in absent[:_MISSES]],
                    "n": len(absent),
                }
            )
        rows.append(
            {
                "id": query.id, "t": _beginning(query.text, _QUERY_CHARS), "c": query.category,
                "r": [[number(doc), grade] for doc, grade in relevant], "g": got,
                "s": [score.get(query.id) for score in scores],
            }
        )  # fmt: skip
    documents = [[doc, _beginning(texts[doc], _TEXT_CHARS)] for doc in numbers]
    return {
        "task": task.name, "k": options.k, "shown": SHOWN, "runs": [run.name for run in runs], "docs": documents,
        "queries": rows, "from": task.relevant_from,
    }  # fmt: skip


def _beginning(text: str, chars: int) -> str:
    words = " ".join(text[: 4 * chars].split())
    return words if len(words) <= chars else words[:chars] + "…"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The tables of all tasks of a report: {"command", "times", "tasks": summaries}."""
    lines = ["# Recall evaluation", "", f"`{report['command']}`", ""]
    for summary in report["tasks"]:
        lines += [f"## {summary['task']}", "", _described(summary), "", *_table(summary, report["times"]), ""]
        for run in summary["runs"]:
            if run["first_error"]:
                failed = sum(count for status, count in run["statuses"].items() if status != "ok")
                told = f"{failed} queries failed (--retry asks them again), the first: {_cell(run['first_error'])}"
                lines += [f"{_cell(run['name'])}: {told}", ""]
            if run["num_unindexed"]:
                lines += [f"{_cell(run['name'])}: {run['num_unindexed']} documents could not be indexed.", ""]
        for name, reason in summary["not_run"].items():
            lines += [f"Not run: {_cell(name)}. {_cell(reason)}", ""]
        for comparison in summary["comparisons"]:
            if comparison["rows"]:
                lines += [*_compared(comparison), ""]
    return "\n".join(lines).rstrip() + "\n"


def _described(summary: dict[str, Any]) -> str:
    budget = f"; lists cut at {summary['budget']} tokens" if summary["budget"] is not None else ""
    scored = "" if summary["num_scored"] == summary["num_queries"] else f", {summary['num_scored']} of them scored,"
    return (
        f"{summary['num_queries']} queries (split {summary['split']}){scored} over {summary['num_documents']} "
        f"documents in {summary['num_scopes']} scope(s); {summary['k']} hits asked for{budget}. "
        f"Task {summary['fingerprint'][:12]}, code {summary['code_version'][:12]}. In brackets: 95 % intervals."
    )


def _table(summary: dict[str, Any], times: bool) -> list[str]:
    counted = "tokens in the budget" if summary["budget"] is not None else f"tokens of {SHOWN} hits"
    heads = ["configuration", *summary["metrics"], counted, "compression", "index MB", "failed", "empty", "tied"]
    heads += ["build s", "query ms"] if times else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for run in summary["runs"]:
        failed = sum(count for status, count in run["statuses"].items() if status != "ok")
        cells = [_cell(run["name"])]
        for metric in run["metrics"].values():
            shown = f"{metric['mean']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
            if failed and metric["completed"] is not None:
                shown += f" ({metric['completed']:.3f} over completed)"
            cells.append(shown)
        ratio = "–" if run["compression"] is None else f"{run['compression']:.2f}x"
        cells += [f"{run['tokens']:,.0f}", ratio, f"{run['index_bytes'] / 1e6:.2f}", str(failed)]
        cells += [str(run["num_empty"]), str(run["num_tied"])]
        if times:
            cells += [f"{run['times']['build_seconds']:.2f}", f"{run['times']['query_ms']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def unit_of(comparison: dict[str, Any]) -> str:
    """What the tests of a comparison take for independent."""
    if comparison["is_one_cluster"]:
        return "queries (all of one cluster, so not independent: take p and intervals for too good)"
    return f"clusters ({comparison['num_clusters']})" if comparison["num_clusters"] else "queries"


def _compared(comparison: dict[str, Any]) -> list[str]:
    lines = [
        f"{comparison['metric']} against {_cell(comparison['baseline'])} ({comparison['chosen']}); sign flips of "
        f"{unit_of(comparison)}, corrected for {comparison['num_comparisons']} comparisons",
        "",
        "| configuration | difference | corrected | p | Holm | Bonferroni | d_z | wins/ties/losses | detectable |",
        "|---" * 9 + "|",
    ]
    for row in comparison["rows"]:
        d_z = "–" if row["d_z"] is None else f"{row['d_z']:+.2f}"
        smallest = "–" if row["smallest_detectable"] is None else f"{row['smallest_detectable']:.3f}"
        lines.append(
            f"| {_cell(row['name'])} | {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] | "
            f"[{row['low_corrected']:+.3f}, {row['high_corrected']:+.3f}] | {row['p']:.2g} | {row['p_holm']:.2g} | "
            f"{row['p_bonferroni']:.2g} | {d_z} | {row['wins']}/{row['ties']}/{row['losses']} | {smallest} |"
        )
    return lines


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
