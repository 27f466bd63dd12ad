"""Attention for short rows on a CPU: torch's, by other products, and only within its context."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import build

from hf_littlebit.internals.transformers_generation import attention_implementation, takes_attention
from hf_littlebit.train import cpu_attention as doors
from hf_littlebit.train.cpu_attention import CHUNK, LONGEST, causal_attention, cpu_attention, last_attention


def parts(batch, heads, key_heads, length, size, queries=None):
    generator = torch.Generator().manual_seed(length)
    shapes = [(heads, queries or length), (key_heads, length), (key_heads, length)]
    return [
        torch.randn(batch, number, rows, size, dtype=torch.float64, generator=generator, requires_grad=True)
        for number, rows in shapes
    ]


@pytest.mark.parametrize("length", [2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 44])
@pytest.mark.parametrize(("batch", "heads", "key_heads"), [(2, 6, 2), (1, 3, 3), (3, 4, 1)])
def test_it_is_torchs_attention_with_its_gradient(batch, heads, key_heads, length):
    values = parts(batch, heads, key_heads, length, 8)
    expected = F.scaled_dot_product_attention(*values, is_causal=True, enable_gqa=True, scale=0.3).transpose(1, 2)
    found = causal_attention(*values, 0.3)
    torch.testing.assert_close(found, expected)
    outer = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for mine, other in zip(
        torch.autograd.grad(found, values, outer), torch.autograd.grad(expected, values, outer), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_one_query_sees_all_keys():
    for batch, heads, key_heads in ((2, 6, 2), (1, 3, 3)):
        values = parts(batch, heads, key_heads, 7, 8, queries=1)
        expected = F.scaled_dot_product_attention(*values, enable_gqa=True, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(last_attention(*values, 0.3), expected)


def test_values_may_have_another_size_than_keys():
    query, key, _ = parts(2, 4, 2, 9, 8)
    value = torch.randn(2, 2, 9, 5, dtype=torch.float64, requires_grad=True)
    found = causal_attention(query, key, value, 0.5)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.5)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    for mine, other in zip(
        torch.autograd.grad(found.sum(), (query, key, value)),
        torch.autograd.grad(expected.sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.fixture
def calls(monkeypatch):
    """How often each of the two functions was called."""
    counts = {"causal_attention": 0, "last_attention": 0}

    def counted(name):
        original = getattr(doors, name)

        def function(*args):
            counts[name] += 1
            return original(*args)

        return function

    for name in counts:
        monkeypatch.setattr(doors, name, counted(name))
    return counts


def long_model(family="llama", **options):
    """A random model of two layers whose context is longer than LONGEST."""
    small = build(family)
    torch.manual_seed(0)
    return type(small)(
        type(small.config)(**{**small.config.to_dict(), "max_position_embeddings": 2048, **options})
    ).eval()


def loss_and_gradient(model, tokens, **given):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, **given).loss
    loss.backward()
    return loss.detach(), torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "opt", "qwen3_moe"])
def test_a_model_trains_as_with_torchs(family, calls):
    model = long_model(family)
    tokens = torch.randint(3, 128, (2, 300), generator=torch.Generator().manual_seed(1))
    expected = loss_and_gradient(model, tokens)
    with cpu_attention(model):
        found = loss_and_gradient(model, tokens)
    assert calls["causal_attention"] == 2  # one for each layer
    torch.testing.assert_close(found[0], expected[0], rtol=2e-3, atol=0)
    assert (found[1] - expected[1]).norm() < 0.05 * expected[1].norm()


@pytest.fixture(autouse=True)
def instructions(monkeypatch):
    """As on a CPU that has those for bfloat16."""
    monkeypatch.setattr(doors, "compute_dtype", lambda device: torch.bfloat16)


def test_a_cpu_without_bfloat16_keeps_torchs(monkeypatch):
    monkeypatch.setattr(doors, "compute_dtype", lambda device: torch.float32)
    model = build("llama")
    with cpu_attention(model):
        assert attention_implementation(model.config) == "sdpa"


def test_what_all_keys_share_costs_no_precision():
    """Scores are rounded to 8 bits, so that an offset of all of them must not be in them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, 64, generator=generator) for _ in range(3))
    offset = torch.zeros(64)
    offset[3] = 50.0
    query[..., 3] += 8
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    query, key, value = (each.bfloat16() for each in (query, key + offset, value))
    found = causal_attention(query, key, value, 0.125).float()
    # The offset's own rounding to bfloat16 stays: 50 + x keeps a quarter of x's unit.
    rounded = F.scaled_dot_product_attention(*(each.float() for each in (query, key, value)), is_causal=True).transpose(
        1, 2
    )
    assert (found - rounded).norm() < 0.02 * expected.norm()
    last = last_attention(query[:, :, -1:], key, value, 0.125).float()
    assert (last - rounded[:, -1:]).norm() < 0.02 * rounded[:, -1:].norm()


def test_so_many_probabilities_that_they_are_not_kept_go_to_torchs(calls, monkeypatch):
    monkeypatch.setattr(doors, "LARGEST", 2 * 4 * 20 * 20 - 1)
    model = long_model().bfloat16()
    with torch.no_grad(), cpu_attention(model):
        model(input_ids=torch.randint(3, 128, (2, 20)))
        assert sum(calls.values()) == 0
        model(input_ids=torch.randint(3, 128, (2, 19)))
        assert sum(calls.values()) == 2


def close(found, expected):
    """Logits in bfloat16 that differ by rounding only."""
    return (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def test_what_is_not_plain_goes_to_torchs(calls):
    model = long_model()
    tokens = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    long = torch.randint(3, 128, (1, LONGEST + 1), generator=torch.Generator().manual_seed(1))
    for given in ({"input_ids": tokens, "attention_mask": mask}, {"input_ids": long}):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(**given).logits
            with cpu_attention(model):
                assert torch.equal(model(**given).logits, expected)
    with torch.no_grad(), cpu_attention(model):
        model(input_ids=tokens)  # in fp32
    assert sum(calls.values()) == 0


def test_a_window_that_is_shorter_than_the_row_is_kept(calls):
    model = long_model("gemma3", sliding_window=100, layer_types=["sliding_attention", "full_attention"]).bfloat16()
    tokens = torch.randint(3, 128, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        with cpu_attention(model):
            assert close(model(input_ids=tokens).logits, expected)
    assert calls["causal_attention"] == 1


def test_a_cache_is_read_as_by_torchs(calls):
    model = long_model().bfloat16()
    tokens = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        with cpu_attention(model):
            out = model(input_ids=tokens[:, :12], use_cache=True)
            states = [out.logits]
            for at in range(12, 20):
                out = model(input_ids=tokens[:, at : at + 1], past_key_values=out.past_key_values)
                states.append(out.logits)
    assert close(torch.cat(states, 1), expected)
    assert calls == {"causal_attention": 2, "last_attention": 16}


def test_several_new_tokens_behind_a_cache_go_to_torchs(calls):
    model = long_model().bfloat16()
    tokens = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), cpu_attention(model):
        expected = model(input_ids=tokens).logits[:, 12:]
        past = model(input_ids=tokens[:, :12], use_cache=True).past_key_values
        found = model(input_ids=tokens[:, 12:], past_key_values=past).logits
    assert close(found, expected)
    assert calls == {"causal_attention": 4, "last_attention": 0}


def test_the_model_has_its_own_attention_afterwards(tmp_path):
    model = build("llama")
    with pytest.raises(KeyError), cpu_attention(model, None, "self"):
        assert attention_implementation(model.config) == "littlebit_causal"
        model.save_pretrained(tmp_path)
        raise KeyError
    assert attention_implementation(model.config) == "sdpa"
    with cpu_attention(model):
        model.set_attn_implementation("eager")
    assert attention_implementation(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert "littlebit_causal" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("eager")
    with cpu_attention(model):
        assert attention_implementation(model.config) == "eager"


def test_models_that_choose_their_own_attention_keep_it():
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "attention_types": [[["global"], 1]], "vocab_size": 16}
    old = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes))
    assert not takes_attention(old)
    with cpu_attention(old):
        assert attention_implementation(old.config) != "littlebit_causal"
