"""Models of transformers with our attention give the logits, gradients and generations that they give with "eager"."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the train extra is not installed")

from workbench.errors import InputError  # noqa: E402
from workbench.kernels import attention_flash, attention_transformers  # noqa: E402
from workbench.kernels.attention_transformers import register  # noqa: E402

# PyTorch's forward mode compiles its decompositions by torch.jit.script, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2 sliding": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
}


@pytest.fixture(autouse=True)
def eager_in_float64(monkeypatch):
    """transformers' "eager" takes its softmax in float32 (and turns float64's smallest number into -inf): not here."""
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))


def build(name: str, implementation: str, dtype=torch.float64):
    register()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation=implementation)
    return model.to(dtype).eval()


def pair(name: str, dtype=torch.float64):
    eager, ours = build(name, "eager", dtype), build(name, "workbench", dtype)
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == "workbench"
    return eager, ours


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(1))


LEFT = torch.tensor([[0, 0, 0] + [1] * 8, [1] * 11])
RIGHT = torch.tensor([[1] * 8 + [0, 0, 0], [1] * 11])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask", [None, torch.ones_like(LEFT), LEFT, RIGHT], ids=["none", "ones", "left", "right"])
def test_logits_and_gradients(name, mask):
    tokens = ids(2, 11)
    real = torch.ones(2, 11) if mask is None else mask
    logits, grads = [], []
    for model in pair(name):
        out = model(tokens, attention_mask=mask).logits[real.bool()]
        logits.append(out)
        grads.append(torch.autograd.grad(out.log_softmax(-1)[:, 5].sum(), list(model.parameters())))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-9)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    eager, ours = pair(name, torch.float32)
    torch.testing.assert_close(ours(ids(2, 11)).logits, eager(ids(2, 11)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mask", [LEFT, torch.ones_like(LEFT)], ids=["left", "ones"])
def test_generation_with_cache_and_left_padding(name, cache, mask):
    made = []
    for model in pair(name):
        # Without an end token, so that every step is compared.
        out = model.generate(
            ids(2, 11), attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
            cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        made.append((out.sequences, torch.stack(out.logits)))
    assert torch.equal(made[0][0], made[1][0])
    torch.testing.assert_close(made[0][1], made[1][1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_continuing_from_a_cache(name):
    """Several new tokens over a cache: causal with fewer queries than keys."""
    tokens = ids(1, 12)
    logits = []
    for model in pair(name):
        first = model(tokens[:, :7], use_cache=True)
        logits.append(model(tokens[:, 7:], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_padding_free_batches_of_trl(name):
    collators = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL is not installed")
    collate = collators.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    sequences = [ids(1, n)[0].tolist() for n in (5, 1, 9, 6)]
    batch = collate([{"input_ids": s} for s in sequences])
    assert "position_ids" in batch
    assert batch["input_ids"].shape == (1, 21)
    eager, ours = pair(name)
    batch = {k: batch[k] for k in ("input_ids", "position_ids")}
    packed = ours(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(packed, eager(**batch, use_cache=False).logits[0], rtol=0, atol=1e-9)
    alone = torch.cat([ours(torch.tensor([s])).logits[0] for s in sequences])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)


def test_several_packed_rows():
    tokens, positions = ids(2, 8), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    eager, ours = pair("llama")
    found, expected = (m(tokens, position_ids=positions, use_cache=False).logits for m in (ours, eager))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_lengths_given_by_the_collator():
    """`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`: lengths as arguments, no masks."""
    sequences = [ids(1, n)[0].tolist() for n in (5, 9)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    batch = collate([{"input_ids": s} for s in sequences])
    _, ours = pair("llama")
    found = ours(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0]
    alone = torch.cat([ours(torch.tensor([s])).logits[0] for s in sequences])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)


@pytest.fixture
def seen(monkeypatch):
    """What the layers pass to `attention`: (implementation asked of explain, form of the mask) per call."""
    calls = []
    inner = attention_transformers.attention

    def spy(q, k, v, **options):
        masks = ("mask", "bias", "window", "key_padding_mask", "cu_seqlens_q", "causal")
        calls.append({name for name in masks if options.get(name) is not None and options[name] is not False})
        return inner(q, k, v, **options)

    monkeypatch.setattr(attention_transformers, "attention", spy)
    return calls


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("llama", {}, [{"causal"}] * 2),
        ("llama", {"attention_mask": LEFT}, [{"mask"}] * 2),
        ("gemma2", {}, [{"causal", "window"}, {"causal"}]),
        ("llama", {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]] * 2), "use_cache": False},
         [{"causal", "cu_seqlens_q"}] * 2),
        ("gemma2", {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]] * 2), "use_cache": False},
         [{"causal", "cu_seqlens_q", "window"}, {"causal", "cu_seqlens_q"}]),
    ],
)  # fmt: skip
def test_masks_reach_the_layers_in_their_smallest_form(name, arguments, expected, seen):
    """Fails where transformers renames its mask functions: results stay right then, but packed batches get slow."""
    build(name, "workbench")(ids(2, 11), **arguments)
    assert [x - {"causal"} if "mask" in x else x for x in seen] == expected


def test_where_flash_attn_would_serve_padding_stays_a_row_of_bits(seen, monkeypatch):
    monkeypatch.setattr(attention_flash, "ready", lambda device, dtype: True)
    eager, ours = pair("llama")
    found, expected = (m(ids(2, 11), attention_mask=LEFT).logits[LEFT.bool()] for m in (ours, eager))
    assert seen == [{"causal", "key_padding_mask"}] * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_encoders():
    """Bidirectional attention: BERT with padding, ViT without masks, T5 with a position bias."""
    register()
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=61, **sizes, initializer_range=0.4)
    vit = transformers.ViTConfig(image_size=8, patch_size=4, **sizes, initializer_range=0.4)
    t5 = transformers.T5Config(vocab_size=61, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text = {"input_ids": ids(2, 11), "attention_mask": RIGHT}
    for kind, config, batch in (
        (transformers.BertModel, bert, text),
        (transformers.ViTModel, vit, {"pixel_values": pixels}),
        (transformers.T5EncoderModel, t5, text),
    ):
        outputs = []
        for implementation in ("eager", "workbench"):
            torch.manual_seed(0)
            config._attn_implementation = implementation
            model = kind._from_config(config, attn_implementation=implementation).double().eval()
            out = model(**batch).last_hidden_state
            outputs.append(out[RIGHT.bool()] if batch is text else out)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)


class Layer(torch.nn.Module):
    """An attention layer of a model with a sliding window, as transformers hands it over."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.MistralConfig(sliding_window=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"output_attentions": True}, "weights"),
        ({"cache": object()}, "paged caches"),
        ({}, r"Layer does not pass its sliding window \(4\)"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(given, message):
    x = torch.zeros(1, 2, 6, 8)
    with pytest.raises(InputError, match=message):
        attention_transformers._attend(Layer(), x, x, x, None, **given)


def test_forward_mode_through_a_transformer():
    """`torch.func.jvp` of the whole model: the tangent of the logits is that of "eager"."""
    tangents = []
    for model in pair("qwen3"):
        x = model.get_input_embeddings()(ids(1, 9)).detach()
        dx = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits = lambda e, m=model: m(inputs_embeds=e, use_cache=False).logits  # noqa: E731
            tangents.append(torch.func.jvp(logits, (x,), (dx,))[1])
    assert tangents[0].abs().mean() > 0.1
    torch.testing.assert_close(*tangents, rtol=1e-8, atol=1e-8)


def test_registering_twice_changes_nothing():
    register()
    register()
    assert transformers.AttentionInterface()["workbench"] is attention_transformers._attend
