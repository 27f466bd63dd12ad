"""Calibration: the figures against autograd's own, what does not count, and that training starts better for it."""

import copy

import pytest
import torch
from families import build
from test_training import CONFIG, Rows, arguments, equal
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_littlebit import LittleBitConfig, calibrate, head_moment
from hf_littlebit.initialize.calibration import _log_likelihood
from hf_littlebit.load.convert import factor_modules, latent_model
from hf_littlebit.train.callback import LittleBitCallback
from hf_littlebit.train.trainer import LittleBitTrainer

TOKENS = Rows().tokens


def batches(count=2, size=4):
    return [{"input_ids": TOKENS[at * size : (at + 1) * size]} for at in range(count)]


def test_figures_are_those_of_autograd():
    model = build("llama").train()
    name, inputs, outputs = "model.layers.0.mlp.down_proj", [], []

    def keep(module, args, output):
        output.retain_grad()
        inputs.append(args[0].detach())
        outputs.append(output)

    state = copy.deepcopy(model.state_dict())
    found = calibrate(model, batches(), seed=5)
    assert model.training and all(value.requires_grad and value.grad is None for value in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    model.eval().get_submodule(name).register_forward_hook(keep)
    generator = torch.Generator().manual_seed(5)
    for batch in batches():
        _log_likelihood(model(**batch).logits, None, generator).backward()
    rows = torch.cat([output.grad.flatten(0, 1) for output in outputs]).square().mean(0).sqrt()
    cols = torch.cat(inputs).flatten(0, 1).square().mean(0).sqrt()
    torch.testing.assert_close(found[f"{name}.weight"].rows, rows)
    torch.testing.assert_close(found[f"{name}.weight"].cols, cols)
    assert "lm_head.weight" not in found and "model.layers.1.self_attn.q_proj.weight" in found


def test_the_likelihoods_gradient_is_drawn_from_the_model():
    """E over y of the squared gradient of log p(y) is p - p^2 for each logit."""
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(20000, 1).requires_grad_()
    _log_likelihood(logits, None, torch.Generator().manual_seed(0)).backward()
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    torch.testing.assert_close(logits.grad.square().mean(0), p - p * p, rtol=0.05, atol=0)


def test_the_moment_of_what_a_head_reads():
    model = build("llama").train()
    hidden = model.eval().model(TOKENS[:8]).last_hidden_state.detach().flatten(0, 1)
    moment = head_moment(model.train(), batches())
    assert model.training and model.lm_head.training and not model.lm_head._forward_pre_hooks
    torch.testing.assert_close(moment, hidden.T @ hidden / len(hidden))
    with torch.autocast("cpu", torch.bfloat16):
        assert head_moment(model, batches()).dtype == torch.float32
    mask = (torch.arange(12) < 8).long().expand(4, 12)
    masked = head_moment(model, [{"input_ids": TOKENS[:4], "attention_mask": mask, "labels": TOKENS[:4], "x": [1]}])
    torch.testing.assert_close(masked, head_moment(model, [{"input_ids": TOKENS[:4, :8]}]))
    assert head_moment(model, []) is None and head_moment(model.model, batches()) is None
    with pytest.raises(ValueError, match="a batch is Tensor; give mappings"):
        head_moment(model, TOKENS)
    assert not model.lm_head._forward_pre_hooks and model.training
    nn.init.zeros_(model.model.norm.weight)
    assert head_moment(model, batches()) is None
    nn.init.constant_(model.model.norm.weight, torch.nan)
    assert head_moment(model, batches()) is None


def test_the_moment_of_a_decoder_behind_an_encoder():
    """Padding of what the encoder reads is none of the decoder's, also where both are as long."""
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    tokens, short = TOKENS[:4], (torch.arange(12) < 4).long().expand(4, 12)
    batch = {"input_ids": tokens, "attention_mask": short, "decoder_input_ids": tokens}
    whole = head_moment(model, [batch])
    cut = head_moment(model, [{**batch, "decoder_attention_mask": short}])
    torch.testing.assert_close(cut, head_moment(model, [{**batch, "decoder_input_ids": tokens[:, :4]}]))
    assert not torch.allclose(whole, cut)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_encoder_and_a_decoder_each_have_their_own_padding(kind):
    """Both read the shared table by embeddings of their own, where gradients begin."""
    if kind == "T5":
        config = T5Config(
            vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
        model, layers = T5ForConditionalGeneration(config), ("encoder.block.0.layer.0.SelfAttention.q.weight",)
        layers += ("decoder.block.0.layer.0.SelfAttention.q.weight",)
    else:
        sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        config = BartConfig(vocab_size=128, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes)
        model = BartForConditionalGeneration(config)
        layers = tuple(f"model.{part}.layers.0.self_attn.q_proj.weight" for part in ("encoder", "decoder"))
    tokens, short = TOKENS[:4], (torch.arange(12) < 4).long().expand(4, 12)
    batch = {"input_ids": tokens, "attention_mask": short, "decoder_input_ids": tokens}
    cut = {"input_ids": tokens[:, :4], "decoder_input_ids": tokens}
    found, expected = calibrate(model, [batch]), calibrate(model, [cut])
    for name in layers:
        assert found[name].rows.any() and found[name].cols.any()
        torch.testing.assert_close(found[name].cols, expected[name].cols, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].rows, expected[name].rows, rtol=1e-3, atol=1e-5)
    other = calibrate(model, [{**batch, "decoder_attention_mask": short}])
    assert not torch.allclose(other[layers[1]].cols, found[layers[1]].cols)


def test_padding_labels_and_unknown_inputs_count_nothing():
    model = build("llama")
    short = [{"input_ids": TOKENS[:1, :8], "attention_mask": torch.ones(1, 8, dtype=torch.long)}]
    padded = [
        {
            "input_ids": TOKENS[:1],
            "attention_mask": (torch.arange(12) < 8).long()[None],
            "labels": torch.full((1, 12), -100),
            "document": ["a"],
        }
    ]
    a, b = calibrate(model, short), calibrate(model, padded)
    for name, (rows, cols) in a.items():
        torch.testing.assert_close(b[name].cols, cols)
        assert b[name].rows.shape == rows.shape  # the draws behind the padding differ in nothing that counts
        torch.testing.assert_close(b[name].rows, rows)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_latent_model_takes_it(family):
    dense = build(family)
    importance = calibrate(dense, batches())
    again = calibrate(dense, batches())
    assert all(torch.equal(a, b) for name in importance for a, b in zip(importance[name], again[name], strict=True))
    plain = latent_model(copy.deepcopy(dense), CONFIG, progress=False)
    model = latent_model(dense, CONFIG, progress=False, importance=importance)
    assert factor_modules(model) and not equal(model, plain)
    assert torch.isfinite(model(**batches()[0]).logits).all()


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        calibrate(build("llama"), [])


def test_trainer_calibrates_on_its_own_data(tmp_path):
    def make(model=None, callback=None, **options):
        callbacks = [callback or LittleBitCallback(CONFIG, "self", pack=False)]
        kind = Trainer if callback else LittleBitTrainer
        return kind(
            model=build("llama") if model is None else model,
            args=arguments(tmp_path),
            callbacks=callbacks,
            train_dataset=Rows(),
            **options,
        ).model

    by_hand = make(callback=LittleBitCallback(CONFIG, "self", pack=False, calibration=batches(4, 2)))
    assert equal(make(), make())
    assert not equal(make(), make(calibration=0))
    # Eight of 32 rows: every fourth, two at a time.
    spread = [{"input_ids": TOKENS[[at, at + 4]]} for at in range(0, 32, 8)]
    mine = make(callback=LittleBitCallback(CONFIG, "self", pack=False, calibration=spread))
    assert equal(make(calibration=8), mine) and not equal(mine, by_hand)
    with pytest.raises(ValueError, match="0 \\(off\\) or more"):
        make(calibration=-1)


def test_streams_are_not_read_ahead(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("read")

    trainer = LittleBitTrainer(build("llama"), arguments(tmp_path), config=CONFIG, train_dataset=Stream())
    assert equal(trainer.model, LittleBitTrainer(build("llama"), arguments(tmp_path), config=CONFIG).model)


def test_resume_keeps_the_first_calibration(tmp_path):
    def run(rows, **resume):
        trainer = LittleBitTrainer(
            build("llama"),
            arguments(tmp_path, save_strategy="steps", save_steps=2),
            config=LittleBitConfig(bpw=3.0, init="admm", steps=10),
            teacher="self",
            train_dataset=Rows(),
            calibration=rows,
        )
        trainer.train(**resume)
        return trainer.model

    whole = run(8)
    assert equal(run(2, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole)
