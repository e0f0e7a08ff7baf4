"""eval make-task and eval answers: a recall task from your own logs, and grades of answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.output import Json, number, print_json, progress, table
from workbench.data.store import Store
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.evals.answers import AnswerItem
    from workbench.evals.asking import Budget, Usage
    from workbench.evals.graders import Grade
    from workbench.evals.tasks.base import RecallTask
    from workbench.llm_client import OpenAIChat

LLM = "With a model"
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable that holds the key; default OPENAI_API_KEY if set.", rich_help_panel=LLM),
]
PriceIn = Annotated[float | None, typer.Option(help="USD per million prompt tokens.", rich_help_panel=LLM)]
PriceOut = Annotated[float | None, typer.Option(help="USD per million completion tokens.", rich_help_panel=LLM)]
BudgetUsd = Annotated[float | None, typer.Option(help="Stop before more than this is spent.", rich_help_panel=LLM)]
BudgetTokens = Annotated[
    int | None, typer.Option(help="Stop before more tokens are used, in and out.", rich_help_panel=LLM)
]
Concurrency = Annotated[int, typer.Option(help="Requests in flight at most.", rich_help_panel=LLM)]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for an answer.", rich_help_panel=LLM)]


def register(group: typer.Typer) -> None:
    """Adds the commands to `workbench eval`."""
    group.command("make-task")(make_task)
    group.command("answers")(answers)


def make_task(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Write the task here (.gz packs it).")],
    kinds: Annotated[
        str | None, typer.Option(help="Of commit, error, reference, title, question; separated by commas.")
    ] = None,
    max_per_kind: Annotated[int, typer.Option(help="Sample at most this many queries of a kind.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    mask_copied: Annotated[
        bool,
        typer.Option("--mask-copied", help="Keep queries that stand verbatim in your logs, and mask them there."),
    ] = False,
    llm: Annotated[str | None, typer.Option(help="A model that also writes questions.", rich_help_panel=LLM)] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Where it is served, e.g. http://localhost:8000/v1.", rich_help_panel=LLM)
    ] = None,
    api_key_env: ApiKeyEnv = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    budget_usd: BudgetUsd = None,
    budget_tokens: BudgetTokens = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 60.0,
    json: Json = False,
) -> None:
    """Make a recall task of your own logs: queries whose answers the logs themselves tell. Use it with `eval recall`.

    Without a model nothing leaves this machine; with one, secrets are redacted first and answers are cached.
    """
    from workbench.evals.tasks import own_logs, task_file

    chosen = _chosen(kinds, llm, base_url)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"`eval recall` knows a task file by its name: FILE.jsonl or FILE.jsonl.gz, not {out}.")
    settings: dict[str, Any] = {"kinds": chosen, "max_per_kind": max_per_kind, "seed": seed, "mask_copied": mask_copied}
    if llm is None:
        with Store(context.obj, read_only=True) as store:
            task, usage = own_logs.build(store.con, **settings), None
    else:
        from workbench.evals.asking import Budget
        from workbench.evals.generated_questions import QuestionWriter
        from workbench.memory.distillers.llm import DuckDBCache

        client = _client(llm, base_url, api_key_env, timeout)
        with Store(context.obj) as store, progress(quiet=json) as say:
            budget = Budget(budget_tokens, budget_usd, price_in, price_out)
            cache = DuckDBCache(lambda: store.con)
            writer = QuestionWriter(client, cache=cache, budget=budget, concurrency=concurrency)

            def look(num: int) -> None:
                say(f"{num:,} questions")
                store.hand_over()

            task, usage = own_logs.build(store.con, **settings, writer=writer, progress=look), writer.usage
    task_file.save(task, out)
    _print_task(task, out, usage, json)


def _chosen(kinds: str | None, llm: str | None, base_url: str | None) -> list[str]:
    from workbench.evals.tasks import own_logs

    default = [*own_logs.DEFAULT_KINDS, *(["question"] if llm else [])]
    chosen = [kind.strip() for kind in kinds.split(",")] if kinds else default
    if (llm is None) != ("question" not in chosen) or (llm and not base_url):
        raise InputError(
            "Questions need --llm (a model's name), --base-url (where it is served) and the kind question."
        )
    return chosen


def _print_task(task: RecallTask, out: Path, usage: Usage | None, json: bool) -> None:
    found = {
        "file": str(out), "documents": len(task.documents), "queries": len(task.queries), "notes": dict(task.notes),
        "fingerprint": task.fingerprint, **({"usage": usage.as_json()} if usage else {}),
    }  # fmt: skip
    if json:
        print_json(found)
        return
    rows = [("documents", number(len(task.documents))), ("queries", number(len(task.queries)))]
    rows += [(name.replace("_", " "), number(count)) for name, count in task.notes.items()]
    table(f"{out}", rows)
    typer.echo(f"Next: `workbench eval recall --task {out}`")


def answers(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Items {id, question, answer, targets}.")],
    grader: Annotated[str, typer.Option(help="exact, f1, math or judge.")] = "exact",
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", metavar="MODEL@URL", help="A judge; repeatable.", rich_help_panel=LLM),
    ] = None,
    versus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Judge in pairs, in both orders: is FILE better than this?", rich_help_panel=LLM
        ),
    ] = None,
    api_key_env: ApiKeyEnv = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    budget_usd: BudgetUsd = None,
    budget_tokens: BudgetTokens = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 60.0,
    json: Json = False,
) -> None:
    """Grade answers by rule, or by judges. Verdicts are kept in the store: the same command goes on where it ended."""
    from workbench.evals import answers as logic
    from workbench.evals.asking import Budget

    items = logic.read_items(file)
    if (grader == "judge") != bool(judge) or (versus and grader != "judge"):
        raise InputError("--grader judge needs --judge MODEL@URL; --judge and --versus need --grader judge.")
    if grader != "judge":
        grades = logic.grade_by_rule(items, grader)
        report: dict[str, Any] = {
            "graders": {grader: logic.summary(items, grades)},
            "grades": _rows(items, grader, grades),
        }
        print_json(report) if json else _print_answers(report)
        return
    others = logic.read_items(versus) if versus else None
    clients = {name: _client(*_model_and_url(name), api_key_env, timeout) for name in judge or ()}
    budget = Budget(budget_tokens, budget_usd, price_in, price_out)
    with Store(context.obj) as store, progress(quiet=json) as say:

        def look(num: int, name: str) -> None:
            say(f"{name}: {num:,} of {len(items):,}")
            store.hand_over()

        report = _judged(store, items, others, clients, budget, concurrency, look)
    print_json(report) if json else _print_answers(report)


def _judged(
    store: Store, items: list[AnswerItem], others: list[AnswerItem] | None, clients: dict[str, OpenAIChat],
    budget: Budget, concurrency: int, look: Any,
) -> dict[str, Any]:  # fmt: skip
    """All judges one after the other, within one budget."""
    from workbench.evals import answers as logic
    from workbench.evals.judge import Judge
    from workbench.evals.pair_judge import PairJudge
    from workbench.memory.distillers.llm import DuckDBCache

    columns: dict[str, list[Grade]] = {}
    report: dict[str, Any] = {"graders": {}, "usage": {}, "grades": []}
    for name, client in clients.items():
        options: Any = {"cache": DuckDBCache(lambda: store.con), "budget": budget, "concurrency": concurrency}
        one = PairJudge(client, **options) if others is not None else Judge(client, **options)
        graded = []
        if isinstance(one, PairJudge):
            verdicts = logic.compare_by_judge(items, others or [], one)
        else:
            verdicts = logic.grade_by_judge(items, one)
        for verdict in verdicts:
            graded.append(verdict)
            look(len(graded), name)
        columns[name] = logic.in_order(items, graded)
        report["graders"][name] = (
            logic.preferences(items, columns[name], one.num_by_position)
            if isinstance(one, PairJudge)
            else logic.summary(items, columns[name])
        )
        report["usage"][name] = one.usage.as_json()
        report["grades"] += _rows(items, name, columns[name])
        budget = budget.minus(one.usage)
    report["agreement"] = logic.agreement(columns)
    return report


def _rows(items: list[AnswerItem], name: str, grades: list[Grade]) -> list[dict[str, Any]]:
    names = ("value", "status", "extracted", "explanation", "seconds")
    return [
        {"id": item.id, "grader": name, "version": grade.grader, **{field: getattr(grade, field) for field in names}}
        for item, grade in zip(items, grades, strict=True)
    ]


def _print_answers(report: dict[str, Any]) -> None:
    for name, found in report["graders"].items():
        rows = [(status, number(count)) for status, count in found["by_status"].items()]
        for key in ("score", "score_completed", "preference"):
            if found.get(key) is not None:
                interval = found[{"preference": "interval"}.get(key, f"{key}_interval")]
                between = f" [{interval['low']:.3f}, {interval['high']:.3f}]" if interval else ""
                rows.append((key.replace("_", " "), f"{found[key]:.3f}{between}"))
        rows += [
            (key.replace("_", " "), number(found[key]))
            for key in ("wins", "ties", "losses", "ties_by_position")
            if key in found
        ]
        table(name, rows)
        if skipped := found["by_status"].get("skipped"):
            typer.echo(
                f"The budget does not reach for one more: {skipped:,} were left out. What was judged is kept; raise it "
                "and run again."
            )
    if agreed := report.get("agreement"):
        alpha = agreed["krippendorff_alpha"]
        typer.echo(f"Agreement of judges: Krippendorff's alpha {'undefined' if alpha is None else f'{alpha:.3f}'}")


def _model_and_url(judge: str) -> tuple[str, str]:
    model, at, url = judge.rpartition("@")
    if not (at and model and url):
        raise InputError(f"--judge takes MODEL@URL, for example llama@http://localhost:8000/v1, not {judge!r}.")
    return model, url


def _client(model: str, base_url: str | None, api_key_env: str | None, timeout: float) -> OpenAIChat:
    from workbench.llm_client import OpenAIChat

    key = api_key_env or ("OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else None)
    return OpenAIChat(base_url, model, api_key_env=key, timeout_seconds=timeout)
