"""The distillation loss: values and gradients against formulas, masking, scaling, chunks, and the teacher on disk."""

import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from families import build

from hf_littlebit.compat import CACHE_NAMES
from hf_littlebit.train import losses
from hf_littlebit.train.distill import HIDDEN_ERRORS, HIDDEN_WEIGHT, Distillation, token_mask
from hf_littlebit.train.losses import hidden_error, kl_divergence
from hf_littlebit.train.topk import TopK, TopKTeacher, save_topk


def pair(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()
    return student, (2 * torch.randn(*shape, generator=generator)).to(dtype)


def plain_kl(student, teacher, mask):
    """The oracle: torch's own KL, everything at once."""
    each = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return each[mask].sum()


def test_kl_by_hand():
    student = torch.tensor([[0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 3.0]]).log_softmax(-1)
    p = teacher.exp()[0]
    loss = kl_divergence(student, teacher.clone(), torch.tensor([True]))
    loss.backward()
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(loss, torch.log(torch.tensor(2.0)) - entropy)
    torch.testing.assert_close(student.grad[0], torch.tensor([0.5, 0.5]) - p)


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_in_chunks(monkeypatch, chunk, dtype):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    student, teacher = pair(2, 5, 13, dtype=dtype)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    wide = student.detach().double().requires_grad_()
    expected = plain_kl(wide, teacher.double(), mask)
    (3 * expected).backward()
    loss = kl_divergence(student, teacher.clone(), mask)
    (3 * loss).backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert loss.dtype is torch.float32 and student.grad.dtype is dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), wide.grad, **tolerance)
    assert not student.grad[~mask].any()


def test_kl_of_other_dtype_and_masked_tokens():
    student, teacher = pair(1, 4, 9)
    teacher[..., 3] = -torch.inf  # a model that forbids a token
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = kl_divergence(student, teacher.double(), mask)
    loss.backward()
    kept = [i for i in range(9) if i != 3]
    p, log_q = teacher[..., kept].softmax(-1), student.detach().log_softmax(-1)[..., kept]
    torch.testing.assert_close(loss, (p * (p.log() - log_q)).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-6)


def test_kl_refuses_a_second_backward():
    student, teacher = pair(1, 2, 5)
    loss = kl_divergence(student, teacher, torch.ones(1, 2, dtype=torch.bool))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("relative", [True, False])
def test_hidden_error(relative):
    student, teacher = pair(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    size = (teacher**2).sum(-1, keepdim=True) if relative else torch.tensor(4.0)
    loss = hidden_error(student, teacher, mask, relative)
    (2 * loss).backward()
    expected = (((student.detach() - teacher) ** 2).sum(-1, keepdim=True) / size)[mask].sum()
    torch.testing.assert_close(loss, expected)
    grad = 2 * 2 * (student.detach() - teacher) / size * mask[..., None]
    torch.testing.assert_close(student.grad, grad)


def test_a_relative_error_is_not_owned_by_a_massive_activation():
    student, teacher = pair(1, 8, 16)
    mask = torch.ones(1, 8, dtype=torch.bool)
    teacher[0, 0] *= 1000
    student.data[0, 0] = 1.1 * teacher[0, 0]
    shares = {}
    for relative in (True, False):
        student.grad = None
        hidden_error(student, teacher, mask, relative).backward()
        sizes = (student.grad * teacher).norm(dim=-1)[
            0
        ]  # what a change of a token's state by its own size does to the loss
        shares[relative] = float(sizes[0] / sizes.sum())
    assert shares[True] < 0.1 and shares[False] > 0.99


def test_a_state_of_zeros_has_no_error_where_it_is_met():
    teacher = torch.zeros(1, 2, 4)
    student = teacher.clone().requires_grad_()
    loss = hidden_error(student, teacher, torch.ones(1, 2, dtype=torch.bool))
    (2**16 * loss).backward()  # as a scaler of float16 gradients begins
    assert loss == 0 and not student.grad.any()


def test_a_state_of_zeros_that_is_missed_by_little_has_a_small_error():
    student, teacher = pair(1, 8, 16)
    teacher[0, 0] = 0
    student.data = teacher.clone()
    student.data[0, 0] = 1e-4
    loss = hidden_error(student, teacher, torch.ones(1, 8, dtype=torch.bool))
    (2**16 * loss).backward()
    assert 0 < loss < 0.1 and torch.isfinite(student.grad).all()


def test_token_mask():
    labels = torch.tensor([[5, 6, -100, 7, 8], [-100, 3, 4, 9, 9]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    shifted = [[True, False, True, True, False], [True, True, False, False, False]]
    assert token_mask(labels, attention, True).tolist() == shifted
    aligned = [[True, True, False, True, True], [False, True, True, False, False]]
    assert token_mask(labels, attention, False).tolist() == aligned
    assert token_mask(labels, None, True)[1].tolist() == [True, True, True, True, False]


def attached(hidden_weight=HIDDEN_WEIGHT, family="llama", teacher=None, error="relative"):
    """A random model and a Distillation from another one."""
    model = build(family).train()
    if teacher is None:
        teacher = copy.deepcopy(model)
        with torch.no_grad():
            for value in teacher.parameters():
                value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    distillation = Distillation(teacher, model, hidden_weight, error)
    distillation.attach(model)
    distillation.place(torch.device("cpu"))
    distillation.active = True
    return model, distillation


def batch(rows=2, length=12, seed=0):
    tokens = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))
    attention = torch.ones_like(tokens)
    attention[0, -3:] = 0
    labels = tokens.masked_fill(attention == 0, -100)
    labels[1, :4] = -100
    return {"input_ids": tokens, "attention_mask": attention, "labels": labels}


@pytest.mark.parametrize("error", HIDDEN_ERRORS)
def test_loss_of_a_model(error):
    model, distillation = attached(0.3, error=error)
    inputs = batch()
    loss = model(**inputs, num_items_in_batch=7).loss
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student = type(model).forward(model, **given, output_hidden_states=True)
        teacher = distillation.teacher(**given, output_hidden_states=True)
    mask = token_mask(inputs["labels"], inputs["attention_mask"], True)
    expected = plain_kl(student.logits, teacher.logits, mask)
    for a, b in zip(student.hidden_states, teacher.hidden_states, strict=True):
        size = b.square().sum(-1) if error == "relative" else b.shape[-1]
        expected = expected + 0.3 * ((a - b).square().sum(-1) / size)[mask].sum()
    torch.testing.assert_close(loss, expected / 7, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "bert", "mixtral"])
def test_equal_models_have_no_loss(family):
    model = build(family)
    model, distillation = attached(1.0, family, copy.deepcopy(model))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = batch()
    loss = model(**inputs).loss
    assert abs(loss.item()) < 1e-6
    count = token_mask(inputs["labels"], inputs["attention_mask"], family != "bert").sum().item()
    assert distillation.take()[2].item() == count


def test_padding_and_ignored_labels_change_nothing():
    model, _ = attached()
    inputs = batch()
    first = model(**inputs).loss
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][0, -3:] = 77  # what stands in the padding
    torch.testing.assert_close(model(**changed).loss, first)
    changed["labels"][0, -3:] = 5  # a label in the padding
    torch.testing.assert_close(model(**changed).loss, first)


def test_accumulation_changes_nothing():
    inputs = batch(4)
    gradients = []
    for size in (4, 1):
        model, _ = attached(0.5)
        count = token_mask(inputs["labels"], inputs["attention_mask"], True).sum()
        for at in range(0, 4, size):
            part = {key: value[at : at + size] for key, value in inputs.items()}
            model(**part, num_items_in_batch=count).loss.backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_only_in_training_and_never_in_the_module_tree():
    model, distillation = attached()
    inputs = batch()
    names = [name for name, _ in model.named_modules()]
    assert names == [name for name, _ in build("llama").named_modules()]
    own = F.cross_entropy(
        model.eval()(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    )
    plain = {key: inputs[key] for key in ("input_ids", "labels")}
    torch.testing.assert_close(model(**plain).loss, own)
    assert distillation.calls == 0
    model.train()
    assert all(value.grad is None for value in distillation.teacher.parameters())
    model(**inputs).loss.backward()
    assert distillation.calls == 1 and all(value.grad is None for value in distillation.teacher.parameters())
    assert not distillation.teacher.training
    distillation.detach(model)
    assert "forward" not in model.__dict__ and distillation.teacher is None


def test_hidden_states_only_for_who_asks():
    model, _ = attached()
    assert set(model(**batch()).keys()) <= {"loss", *CACHE_NAMES}
    assert len(model(**batch(), output_hidden_states=True).hidden_states) == 3
    positional = {key: value for key, value in batch().items() if key != "input_ids"}
    torch.testing.assert_close(model(batch()["input_ids"], **positional).loss, model(**batch()).loss)


def test_a_copy_of_the_model_is_on_its_own():
    model, _ = attached()
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert not other(**batch()).logits.any() and model.eval()(**batch()).logits.any()


def test_errors():
    model, _ = attached()
    with pytest.raises(ValueError, match="without labels"):
        model(input_ids=batch()["input_ids"])
    teacher = build("llama")
    teacher.resize_token_embeddings(100)
    model, _ = attached(teacher=teacher)
    with pytest.raises(ValueError, match=r"100\] and the model's .*128"):
        model(**{**batch(), "input_ids": batch()["input_ids"] % 100})
    config = model.config.to_dict() | {"num_hidden_layers": 1}
    smaller = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model, _ = attached(teacher=smaller)
    with pytest.raises(ValueError, match=r"the model has 3 hidden states of .*, the teacher 2 of"):
        model(**batch())
    model, _ = attached(0.0, teacher=smaller)
    assert model(**batch()).loss.isfinite()
    with pytest.raises(ValueError, match="hidden_error is 'absolute'; choose one of relative, mean_square"):
        Distillation(torch.nn.Identity(), model, hidden_error="absolute")
    with pytest.raises(ValueError, match="hidden_weight is -1"):
        Distillation(teacher, model, -1)


def test_topk_is_exact_with_all_but_one_token():
    student, teacher = pair(2, 3, 6)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    top = teacher.log_softmax(-1).flatten(0, 1).topk(5)
    wide = student.detach().double().requires_grad_()
    expected = plain_kl(wide, teacher.double(), mask)
    expected.backward()
    loss = kl_divergence(student, TopK(top.indices, top.values), mask)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_topk_gradient_is_that_of_its_loss():
    student, teacher = pair(1, 4, 20)
    mask = torch.ones(1, 4, dtype=torch.bool)
    top = teacher.log_softmax(-1).flatten(0, 1).topk(3)
    loss = kl_divergence(student, TopK(top.indices, top.values), mask)
    loss.backward()
    free = student.detach().clone().requires_grad_()
    log_q = free.log_softmax(-1).flatten(0, 1)
    p, q = top.values.exp(), log_q.gather(-1, top.indices).exp()
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    written = (p * (p / q).log()).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    written.backward()
    torch.testing.assert_close(loss, written, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad, free.grad, rtol=1e-4, atol=1e-6)
    assert loss.item() < plain_kl(student.detach(), teacher, mask).item()


def test_a_token_that_the_teacher_rules_out_costs_nothing():
    student, teacher = pair(1, 4, 20)
    teacher[..., 5:] = -math.inf
    mask = torch.ones(1, 4, dtype=torch.bool)
    top = teacher.log_softmax(-1).flatten(0, 1).topk(8)
    loss = kl_divergence(student, TopK(top.indices, top.values), mask)
    loss.backward()
    torch.testing.assert_close(loss, kl_divergence(student, teacher, mask), rtol=1e-4, atol=1e-5)
    assert student.grad.isfinite().all()


def test_topk_goes_on_after_a_kill(tmp_path):
    teacher = build("llama")
    rows = [{"input_ids": torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(n))} for n in range(5)]
    whole = save_topk(teacher, rows, tmp_path / "whole", k=4)
    run = []

    def stop(module, args, kwargs):
        if len(run) == 3:
            raise KeyboardInterrupt
        run.append(kwargs["input_ids"])

    with teacher.register_forward_pre_hook(stop, with_kwargs=True), pytest.raises(KeyboardInterrupt):
        save_topk(teacher, rows, tmp_path / "killed", k=4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["killed.parts", "whole"]
    again = []
    with teacher.register_forward_pre_hook(lambda *call: again.append(call[2]["input_ids"]), with_kwargs=True):
        save_topk(teacher, rows, tmp_path / "killed", k=4, keep=2)
    # Of three that were done the first two were kept.
    assert [part.tolist() for part in again] == [row["input_ids"].tolist() for row in rows[2:]]
    assert sorted(os.listdir(tmp_path)) == ["killed", "whole"] and whole.meta == TopKTeacher(tmp_path / "killed").meta
    for name in ("keys", "tokens", "logprobs"):
        first, second = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("whole", "killed"))
        assert first.dtype == second.dtype and (first == second).all()


def test_topk_on_disk(tmp_path):
    model, distillation = attached(0.0)
    inputs = batch(4)
    rows = [{key: value[at : at + 2] for key, value in inputs.items()} for at in (0, 2)]
    saved = save_topk(distillation.teacher, rows, tmp_path / "logits", k=127)
    full = model(**inputs).loss
    model, _ = attached(teacher=saved)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {key: value[order] for key, value in inputs.items()}
    torch.testing.assert_close(model(**shuffled).loss, full, rtol=2e-3, atol=1e-4)  # float16 log-probabilities
    shuffled["input_ids"][0, 0] += 1
    with pytest.raises(ValueError, match="row 0 of a training batch"):
        model(**shuffled)
    with pytest.raises(ValueError, match="k is 128"):
        save_topk(distillation.teacher, rows, tmp_path / "more", k=128)
    (tmp_path / "logits" / "keys.npy").unlink()
    with pytest.raises(ValueError, match="complete set of teacher logits"):
        TopKTeacher(tmp_path / "logits")
