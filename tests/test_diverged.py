"""Batches without a label, and numbers that are none: what counts nothing, what stops a training, and what is not packed."""

import copy

import pytest
import torch
from families import build, config, load
from test_distill import attached, batch, pair
from test_training import CONFIG, Rows, arguments, make
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from hf_littlebit import LittleBitConfig
from hf_littlebit.load.convert import factor_modules, latent_model, pack_model
from hf_littlebit.train.callback import LittleBitCallback
from hf_littlebit.train.distributed import first_nonfinite
from hf_littlebit.train.losses import hidden_error, kl_divergence
from hf_littlebit.train.trainer import LittleBitTrainer

FIRST = "model.layers.0.self_attn.q_proj"


class Ordered(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class OrderedLittleBit(LittleBitTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class Holes(Rows):
    """Of every six rows two have no label: with two rows in a batch, every third batch has none."""

    def __getitem__(self, row):
        found = super().__getitem__(row)
        return {**found, "labels": torch.full_like(found["labels"], -100)} if row % 6 in (2, 3) else found


@pytest.mark.parametrize("trainer_class", [Ordered, OrderedLittleBit])
@pytest.mark.parametrize("teacher", ["self", None])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_labels_counts_nothing(tmp_path, trainer_class, teacher, accumulation):
    """With SGD the weights after three batches, of which the second is empty, are those after the other two."""
    found = {}
    for name, rows in (("holes", Holes(6 * accumulation)), ("without", None)):
        if rows is None:
            data = Holes(6 * accumulation)
            rows = [data[row] for row in range(len(data)) if row % 6 not in (2, 3)]
        else:
            rows = [rows[row] for row in range(len(rows))]
        if accumulation == 2:  # two micro-batches without a label make a step without one
            empty = [row for row in rows if not (row["labels"] >= 0).any()]
            full = [row for row in rows if (row["labels"] >= 0).any()]
            rows = full[:4] + empty + full[4:]
        options = {"max_steps": len(rows) // (2 * accumulation), "gradient_accumulation_steps": accumulation}
        options |= {"optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "learning_rate": 0.01}
        own = (
            {}
            if trainer_class is Ordered
            else {"calibration": 0, "latent_learning_rate": 0.01, "scale_learning_rate": 0.01}
        )
        trainer = trainer_class(
            model=build("llama"),
            args=arguments(tmp_path, **options),
            train_dataset=rows,
            callbacks=[LittleBitCallback(CONFIG, teacher, pack=False)],
            **own,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(loss == loss for loss in losses)
        found[name] = trainer.model.state_dict(), losses
    (state, losses), (expected, expected_losses) = found["holes"], found["without"]
    assert losses[1] == 0 and [losses[0], *losses[2:]] == expected_losses
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0), None])
def test_the_loss_without_a_label_is_zero(count):
    model, _ = attached()
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    options = {} if count is None else {"num_items_in_batch": count}
    loss = model(**inputs, **options).loss
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_what_does_not_count_may_be_anything():
    mask = torch.tensor([[True, False, True]])
    for loss_of in (hidden_error, kl_divergence):
        student, teacher = pair(1, 3, 6)
        expected = loss_of(student, teacher.clone(), mask)
        expected.backward()
        other = student.detach().clone()
        other[0, 1], teacher[0, 1] = torch.nan, torch.inf
        other.requires_grad_()
        loss = loss_of(other, teacher, mask)
        loss.backward()
        assert torch.equal(loss, expected) and torch.equal(other.grad, student.grad)


def test_second_derivatives_of_distillation_are_refused():
    for loss_of in (hidden_error, kl_divergence):
        student, teacher = pair(1, 3, 6)
        loss = loss_of(student, teacher, torch.ones(1, 3, dtype=torch.bool))
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(loss, student, create_graph=True)


class Poison(TrainerCallback):
    """Leaves a number that is none in one parameter, as a step does that divides by zero."""

    def __init__(self, name, step, value):
        self.name, self.step, self.value = name, step, value

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            with torch.no_grad():
                model.get_parameter(self.name).view(-1)[-1] = self.value


@pytest.mark.parametrize(
    ("name", "value"),
    [(f"{FIRST}.weight", torch.nan), (f"{FIRST}.scale_in", torch.inf), ("model.norm.weight", -torch.inf)],
)
def test_a_step_that_leaves_nan_stops_the_training(tmp_path, name, value):
    trainer = make(tmp_path, callbacks=[Poison(name, 2, value)], save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=f"{name} holds NaN or Inf after step 2, so the training stops"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_learning_rate_without_an_end_stops_the_training(tmp_path):
    trainer = make(tmp_path, learning_rate=1e38, optim="sgd", max_grad_norm=0.0, max_steps=20)
    with pytest.raises(ValueError, match=r"holds NaN or Inf after step \d+"):
        trainer.train()


def test_a_training_does_not_start_from_nan(tmp_path):
    trainer = make(tmp_path)
    with torch.no_grad():
        trainer.model.get_parameter(f"{FIRST}.v")[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{FIRST}.v holds NaN or Inf before its first step"):
        trainer.train()


def test_the_first_of_all_trained_parameters_is_named():
    model = build("llama")
    assert first_nonfinite(model, torch.device("cpu")) is None
    frozen = model.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        frozen[0] = torch.nan
    assert first_nonfinite(model, torch.device("cpu")) == "model.embed_tokens.weight"
    frozen.requires_grad_(False)
    assert first_nonfinite(model, torch.device("cpu")) is None
    assert first_nonfinite(model.requires_grad_(False), torch.device("cpu")) is None


def test_large_numbers_are_finite():
    model = build("llama")
    with torch.no_grad():
        model.get_parameter(f"{FIRST}.weight").fill_(1e30)  # of which the square is not
    assert first_nonfinite(model, torch.device("cpu")) is None
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[1] = -torch.inf
    assert first_nonfinite(model, torch.device("cpu")) == "model.norm.weight"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_not_finite_is_not_packed(family):
    latent = latent_model(build(family), LittleBitConfig(bpw=3.0, init="dual_svid"), progress=False)
    for name, module in list(factor_modules(latent).items())[-1:]:
        for part in module.part_dtypes:
            broken = copy.deepcopy(latent)
            with torch.no_grad():
                broken.get_parameter(f"{name}.{part}").view(-1)[0] = torch.nan
            with pytest.raises(ValueError, match=f"{name}.{part} holds NaN or Inf, so the model cannot be packed"):
                pack_model(broken)
            assert all(one.latent for one in factor_modules(broken).values())
    broken = copy.deepcopy(latent)
    with torch.no_grad():
        broken.model.embed_tokens.weight[2, 2] = torch.inf
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight holds NaN or Inf, so the model cannot be packed"):
        pack_model(broken)
    assert pack_model(latent) is latent


def test_a_model_that_is_begun_is_to_be_loaded_again():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
    options = LittleBitConfig(bpw=3.0, init="dual_svid", scale_dtype="float16")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: scales.*load the model again"):
        latent_model(model, options, progress=False)


def test_a_device_that_is_not_there_is_refused_first():
    model = build("llama")
    with pytest.raises(ValueError, match="svd_device is 'mpps', which this machine does not offer"):
        latent_model(model, LittleBitConfig(bpw=3.0, init="dual_svid"), device="mpps", progress=False)
    assert not factor_modules(model)


def test_scales_beyond_the_stored_dtype_are_not_packed(family_dir):
    latent = load(family_dir("llama"), quantization_config=config(format="latent", scale_dtype="float16"))
    with torch.no_grad():
        latent.get_parameter(f"{FIRST}.scale_rank")[3] = 7e4
    with pytest.raises(ValueError, match=f"{FIRST}.scale_rank reaches 7e.04, but scale_dtype float16 ends at 6.55e.04"):
        pack_model(latent)
