"""The catalog: complete rows, closed words, no torch, and third parties' methods."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from workbench.errors import NotFound
from workbench.policies import catalog

FIELDS = {
    "name", "seed", "title", "arxiv", "backend", "family", "signal", "access", "granularity", "degree", "needs",
    "evidence", "reading",
}  # fmt: skip


def test_every_row_is_complete_and_named_as_its_key() -> None:
    for name in catalog.METHODS:
        entry = catalog.method_module(name).ENTRY
        assert entry.name == name
        row = entry.as_json()
        assert set(row) == FIELDS
        assert all(value != "" for value in row.values())
        assert entry.degree.replace("semi on-policy", "on-policy") in {
            "off-policy", "on-policy", "off-policy to on-policy", "off-policy, then on-policy",
        }  # fmt: skip
        assert "TODO" not in entry.evidence
    cards = [entry.seed for entry in catalog.entries() if entry.seed is not None]
    assert cards == sorted(set(cards))


def test_every_method_is_a_frozen_dataclass_whose_defaults_give_phases() -> None:
    for name in catalog.METHODS:
        method = catalog.method_module(name).METHOD
        assert is_dataclass(method)
        assert method.__dataclass_params__.frozen  # pyright: ignore
        assert all(field.kw_only for field in fields(method))
        assert all(phase.terms for phase in method().phases())


def test_listing_and_phases_import_no_torch() -> None:
    code = """
import sys, json
from workbench.methods import entries
from workbench.policies.catalog import METHODS, method_module
rows = [entry.as_json() for entry in entries()]
phases = [method_module(name).METHOD().phases() for name in METHODS]
print(json.dumps([len(rows), sorted(set(sys.modules) & {"torch", "transformers", "trl", "datasets"})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, heavy = json.loads(done.stdout)
    assert count == len(catalog.METHODS) + 1
    assert heavy == []


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="did you mean 'taid'"):
        catalog.method_module("tiad")


def test_third_parties_add_theirs_as_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = catalog.Entry(**dict.fromkeys(FIELDS - {"seed"}, "x"), seed=999)
    point = SimpleNamespace(name="theirs", load=lambda: SimpleNamespace(ENTRY=entry, METHOD=None))
    found: list[EntryPoint] = [point]  # pyright: ignore
    monkeypatch.setattr(catalog, "entry_points", lambda group: found if group == "workbench.methods" else [])
    catalog._modules.cache_clear()
    try:
        assert catalog.method_module("theirs").ENTRY.seed == 999
        assert 999 in {entry.seed for entry in catalog.entries()}
    finally:
        catalog._modules.cache_clear()
