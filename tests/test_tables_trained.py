"""Training of models whose embedding and head are to be tables of 8 or 4 bits: dense until the end, packed then."""

import copy
import shutil

import pytest
import torch
from families import build, config, equal_states, load, logits
from hf_littlebit.kernels import quantize_table, unpack_table
from safetensors.torch import load_file
from test_train_command import run
from test_training import Rows, Stop, arguments
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, Trainer, TrainerCallback

from hf_littlebit import head_moment, latent_model, pack_model, refine, size_report, unpack_model
from hf_littlebit.command.cli import main
from hf_littlebit.layers.table import PackedEmbedding, PackedHead
from hf_littlebit.load.tables import pack_tables, table_modules
from hf_littlebit.train import callback, session
from hf_littlebit.train.callback import LittleBitCallback
from hf_littlebit.train.data import text_blocks
from hf_littlebit.train.export import latent_checkpoint
from hf_littlebit.train.resume import model_fingerprint
from hf_littlebit.train.trainer import LittleBitTrainer

FAMILIES = ["llama", "llama_tied"]


def tables(bits, **options):
    return config(embedding_bits=bits, head_bits=bits, **options)


class Weights(TrainerCallback):
    """The dense embedding and head as they are when training ends, before the model is packed."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.embedding, self.head = (
            module.weight.detach().clone() for module in (model.get_input_embeddings(), model.lm_head)
        )
        rows = Rows(140)
        spread = [index * 140 // 64 for index in range(64)]
        self.moment = head_moment(model, [{"input_ids": rows[index]["input_ids"][None]} for index in spread])


def trainer_of(
    folder,
    model,
    teacher="self",
    callbacks=(),
    trainer_class=LittleBitTrainer,
    options=None,
    train_dataset=None,
    **training,
):
    littlebit = LittleBitCallback(options, teacher)
    usual = {"train_dataset": train_dataset or Rows(), "callbacks": [*callbacks, littlebit]}
    if trainer_class is LittleBitTrainer:
        usual["calibration"] = 0
    return trainer_class(model, arguments(folder, **training), **usual)


@pytest.mark.parametrize("trainer_class", [Trainer, LittleBitTrainer])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_dense_and_packed_at_the_end(tmp_path, family, bits, trainer_class):
    started = build(family)
    weights = Weights()
    options = {"options": tables(bits), "train_dataset": Rows(140)}
    trainer = trainer_of(tmp_path / "t", build(family), "self", [weights], trainer_class, **options)
    assert not table_modules(trainer.model)
    trainer.train()
    model = trainer.model.eval()
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedHead)
    assert (head.owner == (embedding,)) is (family == "llama_tied")
    for module, weight in ((embedding, weights.embedding), (head, weights.head)):
        assert not torch.equal(weight, started.lm_head.weight) and module.table_bits == bits
        fitted = bits == 4 and (module is head or head.owner)
        moment = weights.moment if fitted else None
        expected = unpack_table(*quantize_table(weight, bits, moment=moment))
        torch.testing.assert_close(module.dense(), expected, rtol=0, atol=0)
        assert torch.equal(expected, unpack_table(*quantize_table(weight, bits))) is not fitted
    trainer.save_model(str(tmp_path / "out"))
    again = load(str(tmp_path / "out"))
    equal_states(model, again)
    assert torch.equal(logits(model), logits(again))
    asked = size_report(build(family), tables(bits)).tables
    assert size_report(str(tmp_path / "out")).tables == asked


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_from_packed_tables(tmp_path, family):
    load_from = tmp_path / "dense"
    build(family).save_pretrained(load_from)
    model = load(str(load_from), quantization_config=tables(8))
    before = copy.deepcopy(model)
    trainer = trainer_of(tmp_path / "t", model, load(str(load_from)))
    weight = model.lm_head.weight
    assert isinstance(weight, nn.Parameter) and weight.requires_grad
    trainer.train()
    assert table_modules(model).keys() == table_modules(before).keys()
    for name, table in table_modules(model).items():
        assert not torch.equal(table.dense(), before.get_submodule(name).dense())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_tables_come_back_as_they_were(tmp_path, family, bits):
    build(family).save_pretrained(tmp_path / "dense")
    model = load(str(tmp_path / "dense"), quantization_config=tables(bits))
    before = {name: table.dense() for name, table in table_modules(model).items()}
    unpack_model(model)
    for name in before:
        model.get_submodule(name).weight.requires_grad_(False)
    trainer_of(tmp_path / "t", model, load(str(tmp_path / "dense"))).train()
    assert before.keys() == table_modules(model).keys()
    for name, table in table_modules(model).items():
        torch.testing.assert_close(table.dense(), before[name], rtol=0, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_and_packed_from_a_checkpoint(tmp_path, family, bits, stories):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "options": tables(bits)}
    whole = trainer_of(tmp_path / "whole", build(family), **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "cut", build(family), callbacks=[Stop(3)], **options).train()
    # A checkpoint is latent: its embedding is dense, and its config says what becomes of it.
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert not any(name.endswith(".codes") for name in load_file(checkpoint / "model.safetensors"))
    resumed = trainer_of(tmp_path / "cut", build(family), **options)
    resumed.train(resume_from_checkpoint=True)
    equal_states(whole.model, resumed.model)
    words = ["pack", str(tmp_path / "whole" / "checkpoint-4"), "--out", str(tmp_path / "out"), "--tokenizer", stories]
    assert main(words) == 0
    if bits == 8:  # 4 are rounded for the text, which is not at hand here
        equal_states(whole.model, load(str(tmp_path / "out")))


class Stream(IterableDataset):
    """With a length, as of shards; torch's base class has a __getitem__ that raises."""

    def __len__(self):
        return 32

    def __iter__(self):
        return iter(Rows())


@pytest.mark.parametrize("trainer_class", [Trainer, LittleBitTrainer])
@pytest.mark.parametrize("obstacle", ["stream", "error", "rows"])
def test_a_training_ends_whatever_the_head_cannot_be_rounded_for(
    tmp_path, obstacle, trainer_class, monkeypatch, caplog
):
    weights = Weights()
    if obstacle == "error":
        monkeypatch.setattr(session, "head_moment", lambda model, batches: next(iter([])))
    options = {"options": tables(4), "train_dataset": Stream() if obstacle == "stream" else None}
    trainer = trainer_of(
        tmp_path, build("llama"), callbacks=[weights], trainer_class=trainer_class, **options, max_steps=2
    )
    if obstacle == "rows":  # of a collator that gives rows, as some trainers have
        monkeypatch.setattr(callback, "spread_batches", lambda rows, collate, examples: iter([[rows[0]]]))
    trainer.train()
    expected = unpack_table(*quantize_table(weights.head, 4))
    torch.testing.assert_close(trainer.model.lm_head.dense(), expected, rtol=0, atol=0)
    assert "lm_head is rounded to 4 bits for its weights alone" in caplog.text
    assert ("cannot be measured: " in caplog.text) is (obstacle != "stream")


def test_latents_are_as_they_were_if_the_moment_cannot_be_had():
    model = latent_model(build("llama"), tables(4), progress=False)
    with pytest.raises(ValueError, match="a batch is Tensor"):
        pack_model(model, moment=head_moment(model, Rows().tokens))
    pack_model(model, moment=head_moment(model, [{"input_ids": Rows().tokens}]))
    assert len(table_modules(model)) == 2


def test_packed_from_a_checkpoint(tmp_path, stories, capsys, caplog):
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside. "
    (tmp_path / "story.txt").write_text(text * 99)
    words = ["--tokenizer", stories, "--out", str(tmp_path / "out"), "--overwrite"]
    models = {}
    for bits in (8, 4):
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "options": tables(bits)}
        trainer = trainer_of(tmp_path / str(bits), load(stories), **options)
        trainer.train()
        assert main(["pack", str(tmp_path / str(bits) / "checkpoint-2"), *words]) == 0
        assert ("--data TEXT" in caplog.text) is (bits == 4)
        models[bits] = trainer.model, load(str(tmp_path / "out"))
    equal_states(*models[8])
    data = ["--data", str(tmp_path / "story.txt")]
    assert main(["pack", str(tmp_path / "8" / "checkpoint-2"), *words, *data]) == 2
    assert "a head of 4 bits is rounded for, and this one has 8" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "4" / "checkpoint-2"), *words, "--column", "story"]) == 2
    assert "--column is 'story', of a text that is not given" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "4" / "checkpoint-2"), *words, *data]) == 0
    fitted, plain = load(str(tmp_path / "out")), models[4][1]
    tokens = text_blocks([text * 99], AutoTokenizer.from_pretrained(stories), 64).tokens.long()[:16]
    latent = latent_checkpoint(str(tmp_path / "4" / "checkpoint-2"))
    with torch.no_grad():
        exact = latent(tokens).logits
        errors = [(model(tokens).logits - exact).norm() for model in (fitted, plain)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_go_through_packed_tables_as_through_dense_ones(family):
    """To the layers below, where somebody has packed them first."""
    model = latent_model(build(family), tables(8), progress=False)
    dense, packed = copy.deepcopy(model), model
    pack_tables(packed, tables(8))
    for name, table in table_modules(packed).items():
        dense.get_submodule(name).weight.data = table.dense()
    dense.tie_weights()
    tokens = torch.arange(3, 27).reshape(2, 12)
    for each in (dense, packed):
        each(tokens, labels=tokens).loss.backward()
    expected, found = (
        {name: value.grad for name, value in each.named_parameters() if "layers" in name} for each in (dense, packed)
    )
    assert found.keys() == expected.keys() and len(found) > 20
    for name, grad in found.items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6)
    held = packed.lm_head.table()
    pack_model(packed)
    assert all(part is was for part, was in zip(packed.lm_head.table(), held, strict=True))


def test_what_cannot_be_packed_is_refused_before_training(tmp_path, capsys, caplog, stories):
    text = "one table, stored once; give embedding_bits and head_bits the same value"
    unequal = config(embedding_bits=8, head_bits=4)
    with pytest.raises(ValueError, match=text):
        trainer_of(tmp_path, build("llama_tied"), options=unequal)
    with pytest.raises(ValueError, match=text):
        latent_model(build("llama_tied"), unequal)
    build("llama_tied").save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=text):
        load(str(tmp_path / "tied"), quantization_config=config(embedding_bits=8, head_bits=4, format="latent"))
    latent = latent_model(build("llama_tied"), config(), progress=False)
    latent.config.quantization_config.head_bits = 8
    with pytest.raises(ValueError, match=text):
        trainer_of(tmp_path, latent, None)
    model = build("llama")
    model.model.embed_tokens.max_norm = 1.0
    latent_model(model, tables(8), progress=False)
    assert "model.embed_tokens with 8,192 weights stays dense" in caplog.text and "max_norm" in caplog.text
    # On the command line before the text is read, of which here is none.
    (tmp_path / "none.txt").touch()
    tied = tmp_path / "stories"
    shutil.copytree(stories, tied)
    words = ["--bpw", 2, "--init", "dual_svid", "--data", tmp_path / "none.txt", "--out", tmp_path / "out", "--cpu"]
    assert run(tied, *words, "--embedding-bits", 8) == 2
    assert text in capsys.readouterr().err


def test_what_cannot_be_packed_is_refused_before_any_layer_is_refined():
    model = build("llama_tied")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="one table, stored once; give embedding_bits and head_bits the same value"):
        refine(model, config(embedding_bits=8, head_bits=4), torch.randint(3, 128, (12, 16)), progress=False)
    assert not hasattr(model.config, "quantization_config")
    equal_states(model, before)


def test_tables_of_other_bits_than_asked_are_refused():
    model = build("llama_tied")
    pack_tables(model, tables(8))
    with pytest.raises(ValueError, match="packed in 8 bits already, but the config asks for embedding_bits=4"):
        pack_tables(model, tables(4))


def test_bits_that_would_have_no_effect_are_refused(tmp_path):
    latent = latent_model(build("llama"), tables(8), progress=False)
    with pytest.raises(ValueError, match=r"asks for head_bits=4, but .* packed with head_bits=8; leave the callback's"):
        trainer_of(tmp_path, latent, None, options=config(embedding_bits=8, head_bits=4))
    with pytest.raises(ValueError, match="asks for embedding_bits=16"):
        trainer_of(tmp_path, latent, None, options=config())
    latent.config.quantization_config.head_bits = 4
    trainer_of(tmp_path, latent, None, options=config(embedding_bits=8, head_bits=4)).train()
    assert latent.model.embed_tokens.table_bits == 8 and latent.lm_head.table_bits == 4


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_teachers_with_other_tables_are_told_apart(tmp_path, part):
    """What a teacher wrote or said is kept under its name."""
    build("llama").save_pretrained(tmp_path)
    model = load(str(tmp_path), quantization_config=tables(8))
    before = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == before
    getattr(model.lm_head, part)[0].neg_()
    assert model_fingerprint(model) != before


def test_from_text_to_packed_tables(tmp_path, capsys, stories):
    text, out = tmp_path / "story.txt", tmp_path / "out"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 60)
    words = ["--bpw", 2, "--init", "dual_svid", "--data", text, "--out", out, "--length", 32, "--cpu"]
    bits = ["--embedding-bits", 8, "--head-bits", 8]
    assert run(stories, *words, *bits, "--steps", 3, "--batch-size", 4) == 0
    report = size_report(str(out))
    assert [table.bits for table in report.tables] == [8] * len(report.tables) and report.tables
    assert isinstance(load(str(out)).lm_head, PackedHead)
    printed = capsys.readouterr().out
    assert "8 bits: " in printed and "packed" in printed
