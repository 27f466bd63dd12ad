"""Training through transformers' Trainer: start, state, end, logs, and every misuse that would go unnoticed."""

import copy
import gc
import json
import math
import weakref

import pytest
import torch
import transformers
from families import SMALL, build, load, logits
from torch.utils.data import Dataset
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainerCallback, TrainingArguments

from hf_littlebit import LatentLittleBitLinear, LittleBitConfig, LittleBitLinear
from hf_littlebit.layers.parts import part_name
from hf_littlebit.load.convert import (
    balance_scales,
    factor_modules,
    latent_model,
    latents_and_scales,
    pack_model,
    unpack_model,
    weight_ranks,
)
from hf_littlebit.load.saving import save_whole
from hf_littlebit.train.callback import LittleBitCallback
from hf_littlebit.train.distill import HIDDEN_WEIGHT
from hf_littlebit.train.flips import SignFlips
from hf_littlebit.train.resume import last_checkpoint
from hf_littlebit.train.topk import save_topk
from hf_littlebit.train.trainer import LittleBitTrainer

CONFIG = LittleBitConfig(bpw=3.0, init="dual_svid", residual=False)
FIGURES = {"loss", "kd_loss", "hidden_loss", "flipped_since_start", "flipped_since_log"}


class Rows(Dataset):
    """Seeded random tokens; some labels are masked, so that micro-batches differ in how many count."""

    def __init__(self, rows=32, length=12):
        self.tokens = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(3))
        self.labels = self.tokens.clone()
        for row in range(rows):
            self.labels[row, : row % 7] = -100

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, row):
        return {"input_ids": self.tokens[row], "labels": self.labels[row]}


def arguments(folder, **options):
    usual = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 2e-3, "save_strategy": "no"}
    usual |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 2}
    return TrainingArguments(str(folder), **{**usual, **options})


def make(folder, model=None, config=CONFIG, teacher="self", callbacks=(), pack=True, **options):
    """A plain Trainer with a LittleBitCallback."""
    model = build("llama") if model is None else model
    callback = LittleBitCallback(config, teacher, pack=pack)
    return Trainer(
        model=model, args=arguments(folder, **options), train_dataset=Rows(), callbacks=[callback, *callbacks]
    )


def trained(folder, **options):
    trainer = make(folder, **options)
    trainer.train()
    return trainer.model.eval()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    """Largest difference of two models' floats."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def test_dense_to_packed(tmp_path):
    dense = build("llama")
    count = sum(isinstance(module, torch.nn.Linear) for module in dense.modules()) - 1
    before = [p for n, p in dense.named_parameters() if "q_proj" in n]
    trainer = make(tmp_path, dense)
    assert trainer.model is dense
    assert sum(isinstance(module, LatentLittleBitLinear) for module in dense.modules()) == count
    assert not any(p is q for p in before for q in dense.parameters())
    trainer.train()
    assert sum(isinstance(module, LittleBitLinear) for module in dense.modules()) == count
    trainer.save_model(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "packed" and config["bpw"] == 3.0
    again = load(str(tmp_path / "packed"))
    assert equal(again, dense) and torch.equal(logits(again.eval()), logits(dense.eval()))
    assert not any(p.requires_grad for m in factor_modules(dense).values() for n, p in m.named_parameters())


@pytest.mark.parametrize("family", ["llama_bias", "mixtral", "gemma3"])
def test_packed_at_the_end_equals_latent(tmp_path, family):
    latent = trained(tmp_path, model=build(family), pack=False)
    packed = trained(tmp_path, model=build(family))
    torch.testing.assert_close(logits(packed), logits(latent), rtol=1e-4, atol=1e-5)
    assert equal(pack_model(latent), packed)


def test_training_moves_signs_towards_the_teacher(tmp_path, stories):
    dense = load(stories)
    teacher = load(stories)
    trainer = Trainer(
        model=dense,
        args=arguments(tmp_path, max_steps=30, logging_steps=10),
        train_dataset=Rows(60, 24),
        callbacks=[LittleBitCallback(LittleBitConfig(bpw=2.0, init="dual_svid"), teacher)],
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    assert len(history) == 3 and history[-1]["kd_loss"] < 0.5 * history[0]["kd_loss"]
    assert history[-1]["hidden_loss"] < history[0]["hidden_loss"]
    assert 0 < history[0]["flipped_since_start"] < history[-1]["flipped_since_start"] < 0.5
    assert history[0]["flipped_since_start"] == history[0]["flipped_since_log"]
    assert history[-1]["flipped_since_log"] < history[-1]["flipped_since_start"]
    expected = history[0]["kd_loss"] + HIDDEN_WEIGHT * history[0]["hidden_loss"]
    assert abs(history[0]["loss"] - expected) < 0.05 * expected  # a mean over steps, and one over tokens


def test_latents_are_fp32_whatever_the_model_is(tmp_path, caplog):
    trainer = make(tmp_path, build("llama").to(torch.bfloat16))
    assert "7 parameters besides latents and scales are 16-bit" in caplog.text
    latents, scales = latents_and_scales(trainer.model)
    assert {value.dtype for value in (*latents, *scales)} == {torch.float32}
    assert all(value.is_contiguous() and value.requires_grad for value in (*latents, *scales))
    assert trainer.model.lm_head.weight.dtype is torch.bfloat16
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters() if p.is_floating_point())


def test_latent_checkpoint_of_from_pretrained_starts_the_same(tmp_path, family_dir):
    folder = family_dir("llama")
    first = trained(tmp_path, model=load(folder), teacher=load(folder))
    config = LittleBitConfig(bpw=3.0, init="dual_svid", residual=False, format="latent")
    latent = load(folder, quantization_config=config)
    assert equal(first, trained(tmp_path, model=latent, config=None, teacher=load(folder)))


def test_packed_model_trains_on(tmp_path, family_dir):
    folder = family_dir("llama")
    model = load(folder, quantization_config=CONFIG)
    model.save_pretrained(tmp_path / "packed")
    model = load(str(tmp_path / "packed")).eval()
    before = logits(model)
    unpack_model(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert equal(pack_model(copy.deepcopy(model)), load(str(tmp_path / "packed")))
    model = trained(tmp_path, model=model, teacher=load(folder))
    assert not torch.equal(logits(model), before)


class Stop(TrainerCallback):
    """What kill -9 leaves behind: nothing after this step runs."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
def test_resume_after_a_kill_is_exact(tmp_path, family):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 1}
    options |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    whole = trained(tmp_path / "whole", model=build(family), **options)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", build(family), callbacks=[Stop(5)], **options).train()
    trainer = make(tmp_path / "killed", build(family), **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert equal(whole, trainer.model)
    # From the checkpoint itself, which is a latent model.
    latent = load(str(tmp_path / "killed" / "checkpoint-4"))
    trainer = make(tmp_path / "killed", latent, config=None, teacher=build(family), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))
    assert equal(whole, trainer.model)


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path, caplog):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}

    def trainer():
        usual = {"config": CONFIG, "teacher": "self", "calibration": 0, "train_dataset": Rows()}
        return LittleBitTrainer(build("llama"), arguments(tmp_path, **options), **usual)

    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        trainer().train(resume_from_checkpoint=True)
    whole = trainer()
    whole.train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"cut')
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6") and equal(whole.model, again.model)
    assert caplog.text.count("is passed over") == 2
    (tmp_path / "checkpoint-6" / "merges.txt").touch()  # of a tokenizer that has none
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_what_stays_dense_is_packed_in_another_dtype(tmp_path):
    model = build("llama")
    callback = LittleBitCallback(CONFIG, teacher="self", dtype=torch.bfloat16)
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=Rows(), callbacks=[callback]).train()
    assert model.get_input_embeddings().weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    logged = logits(model)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(str(tmp_path / "packed"))), logged)


def test_dtypes_by_name_and_none_at_all(tmp_path):
    callback = LittleBitCallback(CONFIG, teacher="self", dtype="bfloat16")
    model = build("llama")
    LittleBitTrainer(model, arguments(tmp_path), callbacks=[callback], train_dataset=Rows()).train()
    assert model.lm_head.weight.dtype == torch.bfloat16
    latent = latent_model(build("llama"), CONFIG, progress=False)
    for wrong in ("bfloat61", torch.int8, "nn"):
        with pytest.raises(ValueError, match="give a floating-point one"):
            LittleBitCallback(CONFIG, dtype=wrong)
        with pytest.raises(ValueError, match="give a floating-point one"):
            pack_model(latent, wrong)
    assert all(module.latent for module in factor_modules(latent).values())


def test_a_model_without_logits_is_not_calibrated_on(tmp_path):
    model = BertForQuestionAnswering(BertConfig(**{**SMALL, "hidden_size": 64}))
    with pytest.raises(ValueError, match="has no logits to calibrate on; leave it out"):
        LittleBitTrainer(model, arguments(tmp_path), config=CONFIG, train_dataset=Rows())


def test_labelled_padding_is_warned_of(tmp_path, caplog):
    class Padded(Rows):
        def __getitem__(self, row):
            tokens = self.tokens[row]
            return {"input_ids": tokens, "labels": tokens, "attention_mask": (torch.arange(len(tokens)) < 9).long()}

    callback = LittleBitCallback(CONFIG, teacher="self")
    Trainer(build("llama"), arguments(tmp_path), train_dataset=Padded(), callbacks=[callback]).train()
    assert caplog.text.count("padding tokens of the first batch have labels") == 1


def test_best_model_at_the_end(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = Trainer(
        model=build("llama"),
        args=arguments(
            tmp_path, load_best_model_at_end=True, metric_for_best_model="step", greater_is_better=False, **options
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(4),
        callbacks=[LittleBitCallback(CONFIG, "self")],
        compute_metrics=lambda prediction: {"step": trainer.state.global_step},
    )
    trainer.train()
    best = load(str(tmp_path / "checkpoint-2"))
    assert equal(pack_model(best), trainer.model)


def test_activation_checkpointing_changes_nothing(tmp_path):
    # Its name before transformers 5.20 or so; later versions warn about it.
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    option = {"activation_checkpointing" if new else "gradient_checkpointing": True}
    plain, checkpointed = trained(tmp_path), trained(tmp_path, **option)
    assert equal(plain, checkpointed)


@pytest.mark.slow
def test_compiled_training(tmp_path):
    plain = trained(tmp_path, pack=False)
    compiled = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", pack=False)
    assert distance(plain, compiled) < 1e-4


def test_bf16_autocast(tmp_path):
    plain, mixed = trained(tmp_path, pack=False), trained(tmp_path, bf16=True, pack=False)
    assert {value.dtype for value in mixed.parameters()} == {torch.float32}
    assert 0 < distance(plain, mixed) < 0.02  # four steps of 2e-3, some of them the other way
    # Packing does not see the autocast wrapper that stays on the model's forward.
    assert pack_model(mixed)(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_fp16_and_layer_norms_under_autocast_to_bf16(tmp_path):
    """A CPU's autocast leaves LayerNorms bf16 products beside weights in fp16, which torch refuses: of a teacher in fp16, and of
    what is evaluated once it is packed in fp16."""
    callback = LittleBitCallback(CONFIG, teacher=build("opt").half(), dtype=torch.float16)
    trainer = LittleBitTrainer(
        build("opt"), arguments(tmp_path, bf16=True), callbacks=[callback], train_dataset=Rows(), eval_dataset=Rows()
    )
    trainer.train()
    assert trainer.model.dtype == torch.float16
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(128), rel=0.1)


def test_accumulation_is_invariant(tmp_path):
    one = trained(tmp_path, per_device_train_batch_size=4, optim="sgd", pack=False)
    two = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, optim="sgd", pack=False)
    assert distance(one, latent_model(build("llama"), CONFIG)) > 0
    assert distance(one, two) < 1e-6


def test_without_a_teacher_the_loss_is_cross_entropy(tmp_path):
    trainer = make(tmp_path, teacher=None, label_smoothing_factor=0.1)
    batch = {key: torch.stack([Rows()[0][key], Rows()[1][key]]) for key in ("input_ids", "labels")}
    assert "forward" not in trainer.model.__dict__
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "kd_loss" not in logged[0] and logged[0]["flipped_since_start"] > 0
    assert trainer.model(**batch).loss.isfinite()


def test_a_teacher_on_disk(tmp_path):
    rows = [{"input_ids": Rows()[row]["input_ids"][None]} for row in range(len(Rows()))]
    saved = save_topk(build("llama"), rows, tmp_path / "logits", k=127)
    live = trained(tmp_path, teacher=build("llama"), pack=False)  # with hidden states
    trainer = make(tmp_path, teacher=saved, pack=False)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["kd_loss"] > 0 and "hidden_loss" not in logged
    assert logged["loss"] == pytest.approx(logged["kd_loss"], rel=0.1)
    assert distance(live, trainer.model) > 0


@pytest.mark.parametrize("trainer_class", [Trainer, LittleBitTrainer])
def test_reporters_see_the_figures(tmp_path, monkeypatch, trainer_class):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda names: [Reporter])
    trainer = own(tmp_path, train=False) if trainer_class is LittleBitTrainer else make(tmp_path)
    trainer.train()
    assert {"kd_loss", "hidden_loss", "flipped_since_start", "flipped_since_log"} <= seen[0].keys()
    assert "kd_loss" not in seen[-1]  # the summary at the end
    # Another Trainer's logs are its own.
    seen.clear()
    Trainer(model=build("llama"), args=arguments(tmp_path), train_dataset=Rows()).train()
    assert seen and all("kd_loss" not in entry for entry in seen)


def test_sign_flips():
    values = [torch.tensor([[1.0, -1.0, 0.0], [2.0, -3.0, 4.0]]), -torch.ones(11)]
    flips = SignFlips(values)

    def fractions():
        return tuple(flips.fractions().values())

    assert flips.fractions() == {"flipped_since_start": 0.0, "flipped_since_log": 0.0}
    values[0][0, 0] = -1.0
    values[1][10] = 0.0
    assert fractions() == (2 / 17, 2 / 17)
    values[1][10] = -1.0
    values[1][3] = -5.0
    assert fractions() == (1 / 17, 1 / 17)
    assert fractions() == (1 / 17, 0.0)
    flips.rebase([-values[0], values[1]])  # as a checkpoint would have loaded them
    assert fractions() == (4 / 17, 0.0)


def own(folder, train=True, **options):
    """A LittleBitTrainer with the learning rates of a plain one."""
    args = arguments(folder, **options)
    rates = {"latent_learning_rate": args.learning_rate, "scale_learning_rate": args.learning_rate}
    callback = LittleBitCallback(CONFIG, "self", pack=False)
    trainer = LittleBitTrainer(
        build("llama"), args, callbacks=[callback], calibration=0, train_dataset=Rows(), eval_dataset=Rows(4), **rates
    )
    if train:
        trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["accumulated", "bf16", "compiled"],
)
def test_both_trainers_train_the_same(tmp_path, options, monkeypatch):
    # LittleBitTrainer's own attention rounds otherwise.
    monkeypatch.setattr("hf_littlebit.train.cpu_attention.compute_dtype", lambda device: torch.float32)
    plain = make(tmp_path, pack=False, **{key: value for key, value in options.items() if "eval" not in key})
    plain.train()
    other = own(tmp_path, **options)
    assert distance(plain.model, other.model) == 0
    figures = [
        [{key: entry[key] for key in entry if key in FIGURES} for entry in each.state.log_history if "loss" in entry]
        for each in (plain, other)
    ]
    assert figures[0] == figures[1] and figures[0][0].keys() == FIGURES


def test_littlebit_trainer_attaches_nothing(tmp_path):
    defaults = list(transformers.trainer.DEFAULT_CALLBACKS)
    trainer = own(tmp_path, train=False)
    # save_pretrained is that of every LittleBit model (load/saving.py), and packs nothing by itself.
    assert "forward" not in vars(trainer.model) and trainer.model.save_pretrained.func is save_whole
    assert [type(callback) for callback in trainer.callback_handler.callbacks][: len(defaults)] == defaults
    trainer.train()
    assert "forward" not in vars(trainer.model) and trainer.model.save_pretrained.func is save_whole
    make(tmp_path)
    assert defaults == transformers.trainer.DEFAULT_CALLBACKS


def test_a_session_without_a_trainer(tmp_path):
    """Its steps are all that a training loop of one's own needs."""
    model, args = build("llama"), arguments(tmp_path)
    session = LittleBitCallback(CONFIG, "self").session
    with pytest.raises(ValueError, match="too late to convert"):
        session.begin(model, None, args.device)
    session.prepare(model, args)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    session.begin(model, optimizer, args.device)
    with pytest.raises(ValueError, match="no distillation"):
        session.refuse_step_without_teacher()
    batch = {key: torch.stack([Rows()[row][key] for row in (0, 1)]) for key in ("input_ids", "labels")}
    losses = []
    for _ in range(3):
        loss = session.distillation.outputs(model, batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    session.refuse_step_without_teacher()
    assert losses[-1] < losses[0] and session.figures().keys() == FIGURES - {"loss"}
    session.end()
    assert all(isinstance(module, LittleBitLinear) for module in factor_modules(model).values())
    with pytest.raises(ValueError, match="to the end already"):
        session.begin(model, optimizer, args.device)


def test_littlebit_trainer_groups(tmp_path):
    trainer = LittleBitTrainer(
        build("llama"),
        arguments(tmp_path, weight_decay=0.1, learning_rate=1e-4),
        config=CONFIG,
        teacher="self",
        latent_learning_rate=1e-3,
        scale_learning_rate=5e-3,
        train_dataset=Rows(),
    )
    groups = trainer.create_optimizer().param_groups
    latents, scales = latents_and_scales(trainer.model)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0), (5e-3, 0), (1e-4, 0.1), (1e-4, 0)]
    assert [len(group["params"]) for group in groups[:2]] == [len(latents), len(scales)] == [28, 42]
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    trainer.train()
    with pytest.raises(ValueError, match="trained its model to the end already"):
        trainer.train(resume_from_checkpoint=True)


def test_littlebit_trainer_takes_a_packed_model(tmp_path, family_dir):
    model = load(family_dir("llama"), quantization_config=CONFIG)
    trainer = LittleBitTrainer(
        model, arguments(tmp_path), teacher=load(family_dir("llama")), train_dataset=Rows(), latent_learning_rate=1e-2
    )
    before = pack_model(copy.deepcopy(model)).state_dict()
    trainer.train()
    after = trainer.model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert before[name].dtype is torch.int32 and not torch.equal(before[name], after[name])


def refused(message, folder, **options):
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


def test_misuse_is_refused_when_the_trainer_is_made(tmp_path, family_dir):
    refused("label_smoothing_factor is 0.1", tmp_path, label_smoothing_factor=0.1)
    refused("use_liger_kernel", tmp_path, use_liger_kernel=True)
    refused("the model is dense", tmp_path, config=None)
    refused("the model is dense", tmp_path, config=None, teacher=None)
    with pytest.raises(ValueError, match="teacher is 'other'"):
        LittleBitCallback(CONFIG, "other")
    with pytest.raises(ValueError, match="sign_gradient is 'hard'"):
        LittleBitCallback(CONFIG, sign_gradient="hard")
    with pytest.raises(ValueError, match="alpha is 0"):
        LittleBitCallback(CONFIG, alpha=0)
    model = build("llama")
    refused("share parameters", tmp_path, model=model, teacher=model)
    latent = latent_model(build("llama"), CONFIG)
    refused("no longer dense", tmp_path, model=latent, config=None)
    refused("has ranks .* asks for", tmp_path, model=latent, config=LittleBitConfig(bpw=1.5), teacher=None)
    packed = load(family_dir("llama"), quantization_config=CONFIG)
    refused("purely quantized", tmp_path, model=packed, teacher=build("llama"))  # transformers' own words
    refused("encoder-decoder", tmp_path, model=t5(), config=LittleBitConfig(bpw=4.0, init="dual_svid"))
    callback = LittleBitCallback(CONFIG)
    Trainer(model=build("llama"), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
    with pytest.raises(ValueError, match="another Trainer already"):
        Trainer(model=build("llama"), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
    with pytest.raises(ValueError, match="given both"):
        LittleBitTrainer(build("llama"), arguments(tmp_path), config=CONFIG, callbacks=[LittleBitCallback(CONFIG)])
    with pytest.raises(ValueError, match="model_init"):
        LittleBitTrainer(build("llama"), arguments(tmp_path), config=CONFIG, model_init=lambda: build("llama"))


def test_trainers_of_trl_are_refused_before_work(tmp_path):
    """They make the loss of other outputs than the model's own loss, so that a teacher would not be heard."""
    sft_trainer = type("SFTTrainer", (Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    for trainer_class in (sft_trainer, type("Mine", (sft_trainer,), {})):
        model = build("llama")
        options = {"model": model, "args": arguments(tmp_path), "train_dataset": Rows()}
        with pytest.raises(
            ValueError, match=f"{trainer_class.__name__} is a trainer of TRL.* Distil with LittleBitTrainer"
        ):
            trainer_class(**options, callbacks=[LittleBitCallback(CONFIG, teacher="self")])
        assert equal(model, build("llama"))
        trainer_class(**options, callbacks=[LittleBitCallback(CONFIG)]).train()
        assert any(isinstance(module, LittleBitLinear) for module in model.modules())


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=64, d_ff=96, num_layers=1, num_heads=4, d_kv=16))


def test_adapters_need_no_callback(tmp_path, family_dir):
    peft = pytest.importorskip("peft")
    packed = load(family_dir("llama"), quantization_config=CONFIG)
    model = peft.get_peft_model(packed, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    refused("adapters", tmp_path, model=model, teacher=build("llama"))


def test_misuse_is_refused_when_training_starts(tmp_path):
    with pytest.raises(ValueError, match=r"weight decay 0\.1"):
        make(tmp_path, weight_decay=0.1).train()
    trainer = make(tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    with pytest.raises(ValueError, match="compute_loss_func"):
        trainer.train()
    callback = LittleBitCallback(CONFIG, build("llama"))
    trainer = Trainer(
        model_init=lambda: build("llama"), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[callback]
    )
    with pytest.raises(ValueError, match="model_init"):
        trainer.train()
    dense = build("llama")
    optimizer = torch.optim.SGD([p for n, p in dense.named_parameters() if "proj" in n], lr=1e-3)
    trainer = Trainer(
        model=dense,
        args=arguments(tmp_path),
        train_dataset=Rows(),
        callbacks=[LittleBitCallback(CONFIG)],
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match="made before the model was converted"):
        trainer.train()

    trainer = Trainer(model=build("llama"), args=arguments(tmp_path), train_dataset=Rows())
    trainer.add_callback(LittleBitCallback(CONFIG))
    with pytest.raises(ValueError, match="existed already"):
        trainer.train()


def test_one_callback_prepares_a_model(tmp_path):
    callbacks = [LittleBitCallback(CONFIG, teacher="self"), LittleBitCallback()]
    with pytest.raises(ValueError, match="prepared by another LittleBitCallback already"):
        Trainer(build("llama"), arguments(tmp_path), train_dataset=Rows(), callbacks=callbacks)


def test_nothing_outlives_its_trainer(tmp_path):
    """What is kept for the logs must not keep model, latents and teacher."""
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None


def test_training_twice_is_refused(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    with pytest.raises(ValueError, match="trained its model to the end already"):
        trainer.train()
    with pytest.raises(ValueError, match="cannot be loaded into this model"):
        trainer.train(resume_from_checkpoint=True)


def test_a_loss_that_bypasses_the_model_is_refused(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model.lm_head(model.model(input_ids=inputs["input_ids"]).last_hidden_state).square().mean()

    trainer = Own(
        model=build("llama"),
        args=arguments(tmp_path),
        train_dataset=Rows(),
        callbacks=[LittleBitCallback(CONFIG, "self")],
    )
    with pytest.raises(ValueError, match="no distillation"):
        trainer.train()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_balanced_scales_are_the_same_weight(family):
    model = latent_model(build(family), LittleBitConfig(bpw=4.0, init="dual_svid", residual=True), progress=False)
    before, dense = logits(model.eval()), [m.dense() for m in factor_modules(model).values() if hasattr(m, "dense")]
    balance_scales(model)
    for module in factor_modules(model).values():
        for weight in weight_ranks(module):
            sizes = [getattr(module, part_name(weight, f"scale_{side}")).abs().mean() for side in ("out", "rank", "in")]
            assert max(sizes) < 4 * min(sizes), (weight, sizes)
    after = [module.dense() for module in factor_modules(model).values() if hasattr(module, "dense")]
    assert all(torch.equal(a, b) for a, b in zip(dense, after, strict=True))  # powers of two change no bit
    assert torch.equal(logits(model), before)


def test_in_place_conversions_refuse_what_they_cannot_do():
    latent = latent_model(build("llama"), CONFIG, progress=False)
    with pytest.raises(ValueError, match="LittleBit layers already"):
        latent_model(latent, CONFIG)
    with pytest.raises(ValueError, match="nothing to unpack"):
        unpack_model(latent)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_model(build("llama"))
    with torch.device("meta"):
        absent = build("llama")
    with pytest.raises(ValueError, match="offloaded"):
        latent_model(absent, CONFIG)


def test_a_model_in_memory_is_converted_whole(family_dir):
    """Whatever class its checkpoint had: in memory there is no telling what is new, and all of it may be trained by now."""
    model_class = transformers.AutoModelForSequenceClassification
    model = latent_model(model_class.from_pretrained(family_dir("bert"), num_labels=3), CONFIG, progress=False)
    assert isinstance(model.bert.pooler.dense, LatentLittleBitLinear)
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
