"""distill: exchanges into memories, by the built-in distiller or by any OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.app import app
from workbench.cli.output import Json, number, print_json, progress, say, table
from workbench.errors import EXIT_QUARANTINED, InputError

if TYPE_CHECKING:
    from workbench.data.store import Store
    from workbench.memory.distill import DistillReport
    from workbench.memory.distillers.llm import LlmDistiller

LLM = "With --distiller llm"


@app.command()
def distill(
    context: typer.Context,
    distiller: Annotated[str, typer.Option(help="extractive (built in, no model) or llm.")] = "extractive",
    limit: Annotated[int | None, typer.Option(min=0, help="At most this many exchanges in this run.")] = None,
    embedder: Annotated[
        str | None, typer.Option(help="lsa (learnt from your logs), hashed, or sentence-transformers/MODEL.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Where the model is served, e.g. http://localhost:8000/v1.", rich_help_panel=LLM)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its name there.", rich_help_panel=LLM)] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable that holds the key; default OPENAI_API_KEY if set.", rich_help_panel=LLM
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight at most.", rich_help_panel=LLM)] = 8,
    price_in: Annotated[
        float | None, typer.Option(help="Price per million prompt tokens.", rich_help_panel=LLM)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(help="Price per million completion tokens.", rich_help_panel=LLM)
    ] = None,
    max_cost: Annotated[float | None, typer.Option(help="Stop when this much is spent.", rich_help_panel=LLM)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens, in and out.", rich_help_panel=LLM)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.", rich_help_panel=LLM)] = 60.0,
    json: Json = False,
) -> int:
    """Turn exchanges into compact memories. Goes on where it stopped; Ctrl-C loses at most a second of work.

    With llm, secrets are redacted before anything is sent, answers are cached, and what fails stays pending:
    exit code 3 says that some did, and the same command tries them again.
    """  # fmt: skip
    from workbench import api

    made: list[LlmDistiller] = []

    def make_llm(store: Store) -> LlmDistiller:
        from workbench.llm_client import OpenAIChat
        from workbench.memory.distillers.llm import DuckDBCache, LlmDistiller

        key = api_key_env or ("OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else None)
        client = OpenAIChat(base_url or "", model or "", api_key_env=key, timeout_seconds=timeout)
        made.append(
            LlmDistiller(
                client, cache=DuckDBCache(lambda: store.con), concurrency=concurrency, price_in=price_in,
                price_out=price_out, max_cost=max_cost, max_tokens=max_tokens,
            )
        )  # fmt: skip
        return made[0]

    if distiller not in ("extractive", "llm"):
        raise InputError(f"--distiller takes extractive or llm, not {distiller!r}.")
    if distiller == "llm" and not (base_url and model):
        raise InputError("--distiller llm needs --base-url (where the model is served) and --model (its name there).")
    with progress(quiet=json) as say:

        def look(report: DistillReport) -> None:
            say(f"{report.memories_added:,} memories, {report.failed:,} failed")

        chosen = make_llm if distiller == "llm" else None
        report = api.distill(context.obj, chosen, limit=limit, embedder=embedder, progress=look)
    usage = made[0].usage.as_json() if made else None
    print_json({**report.as_json(), **({"usage": usage} if usage else {})}) if json else _print(report, usage)
    return EXIT_QUARANTINED if report.failed else 0


def _print(report: DistillReport, usage: dict[str, Any] | None) -> None:
    ratio = f" ({report.verbatim_tokens / report.memory_tokens:.1f}x fewer)" if report.memory_tokens else ""
    rows = [
        ("memories added", number(report.memories_added)), ("failed", number(report.failed)),
        ("still pending", number(report.pending)), ("verbatim tokens", number(report.verbatim_tokens)),
        ("memory tokens", f"{report.memory_tokens:,}{ratio}"),
        *((name, str(value)) for name, value in (usage or {}).items()),
    ]  # fmt: skip
    table(f"Distilled by {report.distiller} in {report.seconds:.1f} s", rows)
    for reason, count in report.reasons.most_common(5):
        say(f"{count} x {reason}")
    if report.failed:
        say(f"Failed and still pending: {number(report.failed)}. The same command tries them again.")
