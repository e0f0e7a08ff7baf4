"""eval bench: any model on the tasks that have a verifier or an environment."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.output import Json, number, print_json, progress, table
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.evals.bench_run import Policy, Progress

SPLIT = "train, test or all (both)."


def register(group: typer.Typer) -> None:
    """Adds the commands to `workbench eval`."""
    group.command("bench")(bench)
    group.command("compare")(compare)
    group.command("benches")(benches)
    group.command("add-tasks")(add_tasks)


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option(metavar="FOLDER|NAME@URL", help="A model folder, or a served model.")],
    name: Annotated[str, typer.Option("--bench", metavar="NAME", help="One of `workbench eval benches`.")],
    split: Annotated[str, typer.Option(help=SPLIT)] = "test",
    samples: Annotated[int, typer.Option(help="Completions of each task; above 1 it needs a temperature.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Of a completion; default: the bench's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many tasks; marked as partial.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples that are drawn and committed together.")] = 32,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Chat template or plain text; default: chat where it can.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a served model's tokenizer.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the key; default OPENAI_API_KEY if set.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Draw again what could not be judged before.")] = False,
    json: Json = False,
) -> None:
    """Score a model on a bench: every sample is kept in the store, and none is drawn twice.

    Ctrl-C keeps what was committed; the same command goes on from there.
    """
    from workbench.evals.bench_report import report
    from workbench.evals.bench_run import Sampling, run_bench
    from workbench.evals.benches import load_bench

    found = load_bench(name, split)
    with _policy(model, tokenizer, api_key_env) as policy, progress(quiet=json) as say:
        is_chat = chat if chat is not None else bool(getattr(policy.tokenizer, "chat_template", None))
        sampling = Sampling(temperature, max_tokens or found.max_tokens, seed, batch_size, is_chat)

        def look(now: Progress) -> None:
            failed = f", {now.failed:,} not judged" if now.failed else ""
            say(f"{name}: {now.done:,} of {now.total:,} samples, score {now.score:.3f}{failed}")

        evaluation = run_bench(
            context.obj, found, policy, sampling, num_samples=samples, limit=limit, retry=retry, progress=look
        )
    is_partial = len(evaluation.task_ids) < len(found.tasks)
    figures = report(context.obj, evaluation, is_partial=is_partial)
    print_json(figures) if json else _print(figures)


def _policy(model: str, tokenizer: Path | None, api_key_env: str | None) -> AbstractContextManager[Policy]:
    from workbench.evals.bench_policy import local_policy, served_policy

    if "://" not in model:
        return nullcontext(local_policy(model))
    served, at, url = model.partition("@")
    if not (at and served and "://" not in served) or tokenizer is None:
        raise InputError(
            f"A served model is NAME@URL, for example llama@http://localhost:8000/v1, with --tokenizer FOLDER; not "
            f"{model!r}{'' if tokenizer else ' without --tokenizer'}."
        )
    return served_policy(served, url, tokenizer, api_key_env)


def _print(figures: dict[str, Any]) -> None:
    rows = [("tasks", number(figures["tasks"])), ("samples", number(figures["samples"]))]
    rows += [(f"  {status.replace('_', ' ')}", number(count)) for status, count in figures["by_status"].items()]
    rows += [("score", _between(figures["score"])), ("score, completed only", _between(figures["score_completed"]))]
    for key, label in (("pass_at", "pass@{}"), ("pass_hat", "pass^{}")):
        rows += [(label.format(k), _between(value)) for k, value in figures.get(key, {}).items()]
    if "majority" in figures:
        rows.append(("majority vote", _between(figures["majority"])))
    rows.append(("tokens a sample", f"{figures['mean_tokens']:.1f}"))
    partial = ", PARTIAL" if figures["is_partial"] else ""
    table(f"{figures['task_set']} ({figures['split']}{partial}): {figures['model']}", rows)
    if figures["not_judged"]:
        typer.echo(
            f"{figures['not_judged']:,} samples could not be judged and count 0 in the score; --retry draws them again."
        )
    typer.echo(f"Evaluation {figures['eval_id']}: {figures['drawn']:,} drawn now, {figures['stored']:,} in the store.")


def _between(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "none"
    if interval["low"] is None:
        return f"{interval['estimate']:.3f}"
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def compare(
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="EVAL_ID", help="As `eval bench` says at its end.")],
    second: Annotated[str, typer.Argument(metavar="EVAL_ID", help="Of the same tasks and grader.")],
    json: Json = False,
) -> None:
    """Compare two evaluations of `eval bench` task by task; nothing is drawn. --json has every task's scores."""
    from workbench.evals.bench_report import compare as compared

    found = compared(context.obj, first, second)
    if json:
        print_json(found)
        return
    counts = [number(found[name]) for name in ("better_tasks", "worse_tasks", "equal_tasks")]
    rows = [
        (f"score of {model}", f"{score:.3f}") for model, score in zip(found["models"], found["scores"], strict=True)
    ]
    rows += [
        ("difference", _between(found["difference"])),
        ("p (sign flips by task)", f"{found['p']:.3g}"),
        ("tasks better, worse, equal", ", ".join(counts)),
    ]
    rows += [(f"{name} differs", f"{one} and {other}") for name, (one, other) in found["sampling_differs"].items()]
    table(f"{found['task_set']} ({found['split']}), {number(found['tasks'])} tasks: {first} - {second}", rows)


def benches(json: Json = False) -> None:
    """List the benches that --bench takes."""
    from workbench.evals.benches import BENCHES

    if json:
        print_json([{"name": name, "asks": asks} for name, asks in BENCHES.items()])
    else:
        table("Benches", list(BENCHES.items()))


def add_tasks(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="BENCH", help="One of `workbench eval benches`.")],
    split: Annotated[str, typer.Option(help=SPLIT)] = "train",
    json: Json = False,
) -> None:
    """Put a bench's tasks into the store, where recipes of `workbench train` find them by set and split."""
    from workbench.data.store import Store
    from workbench.evals.benches import load_bench
    from workbench.policies.store import save_tasks

    parts = ("train", "test") if split == "all" else (split,)
    counts = {}
    for part in parts:
        tasks = load_bench(name, part).tasks
        with Store(context.obj) as store, store.transaction() as con:
            counts[part] = {"tasks": len(tasks), "added": save_tasks(con, name, part, tasks)}
    if json:
        print_json({"set": name, "splits": counts})
        return
    for part, count in counts.items():
        typer.echo(f"{name} ({part}): {count['tasks']:,} tasks, {count['added']:,} of them new.")
