"""The adapter of the lm-evaluation-harness, where that is installed: its numbers are the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra evals)")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its libraries' own

import torch  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.evals.lm_eval_adapter import LocalLM, run  # noqa: E402
from workbench.policies.lm.local_models import LocalModel, make  # noqa: E402

WORDS = [f"w{i}" for i in range(26)]


@pytest.fixture(scope="module")
def local() -> LocalModel:
    torch.set_num_threads(1)
    return make(WORDS, hidden=32, layers=2, seed=3)


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def logprob(local: LocalModel, context: str, continuation: str) -> float:
    """Token by token, one at a time."""
    before, total = local.tokenizer(context)["input_ids"], 0.0
    for token in local.tokenizer(continuation)["input_ids"]:
        with torch.no_grad():
            total += local.model(torch.tensor([before])).logits[0, -1].log_softmax(-1)[token].item()
        before = [*before, token]
    return total


def test_log_likelihoods_are_the_models_own_whatever_the_batch(local: LocalModel) -> None:
    pairs = [("w1 w2", " w3"), ("w4", " w5 w6 w7"), ("w1 w2 w3 w4 w5 w6", " w1"), ("w9", " w9")]
    for batch_size in (1, 3, 16):
        found = LocalLM(local, batch_size).loglikelihood([asked(*pair) for pair in pairs])
        assert [total for total, _ in found] == pytest.approx([logprob(local, *pair) for pair in pairs], abs=1e-4)


def test_greedy_is_what_the_model_would_write(local: LocalModel) -> None:
    lm = LocalLM(local)
    best = lm.generate_until([asked("w1 w2", {"max_gen_toks": 3})])[0]
    assert len(best.split()) == 3
    assert lm.loglikelihood([asked("w1 w2", f" {best}")])[0][1]
    other = next(word for word in WORDS if word != best.split()[0])
    assert not lm.loglikelihood([asked("w1 w2", f" {other}")])[0][1]


def test_rolling_likelihood_sums_over_windows(local: LocalModel) -> None:
    lm, text = LocalLM(local), " ".join(WORDS[i % 26] for i in range(30))
    whole = lm.loglikelihood_rolling([asked(text)])[0]
    assert whole == pytest.approx(logprob(local, "<eos>", text), abs=1e-3)
    lm.max_length = 11
    assert lm.loglikelihood_rolling([asked(text)])[0] != whole


def test_generation_is_cut_at_the_first_stop_and_other_settings_are_refused(local: LocalModel) -> None:
    lm = LocalLM(local)
    text = lm.generate_until([asked("w1", {"max_gen_toks": 8})])[0]
    words = text.split()
    assert len(words) > 1
    stopped = lm.generate_until([asked("w1", {"max_gen_toks": 8, "until": ["never", words[1]]})])[0]
    assert stopped == text[: text.index(words[1])]
    with pytest.raises(InputError, match=r"top_p=0\.5 is not carried out"):
        lm.generate_until([asked("w1", {"top_p": 0.5})])
    with pytest.raises(InputError, match="Lower max_gen_toks"):
        lm.generate_until([asked("w1", {"max_gen_toks": 5000})])
    with pytest.raises(InputError, match="does not fit"):
        lm.loglikelihood([asked("w1 " * 200, " w2")])


TASK = """
task: made
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: %s
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def harness(folder: Path, choices: str, num: int = 24) -> list[dict[str, Any]]:
    rows = [
        {"question": f"w{i} w{i % 7}", "first": f"w{(i * 5) % 26}", "second": f"w{(i * 3 + 1) % 26}", "answer": i % 2}
        for i in range(num)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "made.yaml").write_text(TASK % (folder / "data.jsonl", choices))
    return rows


def test_a_task_of_the_harness_gets_the_accuracy_that_the_model_has(
    local: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = harness(tmp_path, '"{{[first, second]}}"')
    right = 0
    for row in rows:
        scores = [logprob(local, row["question"], f" {row[name]}") for name in ("first", "second")]
        right += scores.index(max(scores)) == row["answer"]
    found = run(local, ["made"], tmp_path)
    assert found["made"]["acc,none"] == pytest.approx(right / len(rows))
    with pytest.raises(InputError, match="No task 'other'"):
        run(local, ["other"], tmp_path)


def test_an_unrendered_template_is_no_score(local: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    harness(tmp_path, '["{{first}}", "{{second}}"]')
    with pytest.raises(InputError, match="left unrendered"):
        run(local, ["made"], tmp_path)
