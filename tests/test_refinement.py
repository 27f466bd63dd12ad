"""Refinement: blocks are called as their model calls them, tuning brings the block nearer, and a kill loses one block at most."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from families import SMALL, build, config, equal_states, load
from hf_littlebit.kernels import quantize_table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_littlebit import LittleBitConfig, Recipe, TopKTeacher, head_moment, refine
from hf_littlebit.command.refine_command import TOKENS as TOKENS_READ
from hf_littlebit.initialize.calibration import Recorder
from hf_littlebit.load import tables
from hf_littlebit.load.convert import factor_modules, latent_model
from hf_littlebit.plan import plan_model
from hf_littlebit.refinement import block_work, distillation, refinement, tuning
from hf_littlebit.refinement.allocation import NOISE, SLOPE, allocate, can_share, measure_costs, shares
from hf_littlebit.refinement.blocks import BlockList, Calls, NoChain, find_blocks
from hf_littlebit.refinement.distillation import SEEN, Schedule, settle_latents
from hf_littlebit.refinement.recipe import as_tokens, block_rows, distilled_rows, spread_rows
from hf_littlebit.refinement.tuning import Rates, relative_error, tune_block

TOKENS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0))
BLOCKS_ALONE = Recipe(epochs=1, distillation=None)
CAUSAL = ["llama", "llama_tied", "llama_bias", "opt", "phi3", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"]


def blocks_of(model):
    return find_blocks(model, [weight.module for weight in plan_model(model, config()).weights])


@pytest.mark.parametrize("family", CAUSAL)
def test_a_chain_of_blocks_is_the_model(family):
    """Embeddings, every block with what it is called with, and the head give the model's own logits."""
    model = build(family)
    blocks, tokens = blocks_of(model), TOKENS[:3]
    blocks.check(tokens[:2])
    assert len(blocks) == 2
    with torch.no_grad():
        hidden = blocks.first_input(tokens)
        for index in range(len(blocks)):
            hidden = Calls(blocks, index, TOKENS, torch.device("cpu"))(slice(0, 3))(blocks[index], hidden)
        found = blocks.logits(tokens, hidden)
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected)
    assert all("forward" not in block.__dict__ for block in model.modules())


def test_arguments_that_depend_on_tokens_are_asked_for_every_batch():
    class Block(nn.Module):
        def forward(self, hidden_states, extra):
            return hidden_states + extra

    model = build("llama")
    inner = model.model
    inner.layers = nn.ModuleList([Block(), Block()])

    def forward(input_ids, use_cache=False, **unused):
        hidden = model.get_input_embeddings()(input_ids)
        for block in inner.layers:
            hidden = block(hidden, extra=model.get_input_embeddings()(input_ids + 1))
        return hidden

    model.forward = forward
    calls = Calls(BlockList(model, ["model.layers.0", "model.layers.1"]), 1, TOKENS.clamp(max=126), torch.device("cpu"))
    for rows in (slice(0, 2), torch.tensor([5, 1])):
        expected = model.get_input_embeddings()(TOKENS.clamp(max=126)[rows] + 1)
        assert torch.equal(calls(rows).kwargs["extra"], expected)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GraniteMoeForCausalLM"])
def test_what_all_rows_share_is_asked_of_the_model_once(kind):
    """Also of a model whose forward takes use_cache among **kwargs: a cache would be another object in every call."""
    options = {"num_local_experts": 4, "num_experts_per_tok": 2} if "Moe" in kind else {}
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**{**SMALL, **options})).eval()
    calls = Calls(blocks_of(model), 1, TOKENS, torch.device("cpu"))
    asked = []
    with model.register_forward_pre_hook(lambda *_: asked.append(1)):
        for at in range(0, 20, 4):
            calls(slice(at, at + 4))
    assert len(asked) == 1


def test_models_that_are_no_chain_are_refused():
    model = build("llama")
    model.model.layers[0].forward = lambda hidden_states, **unused: model.model.layers[1](hidden_states, **unused)
    with pytest.raises(NoChain, match="as a chain"):
        blocks_of(model).check(TOKENS[:1])
    with pytest.raises(NoChain, match="list of blocks"):
        find_blocks(build("llama"), ["lm_head"])
    other = build("llama")
    first = other.model.layers[0]
    first.forward = lambda states, **unused: states
    other.model.forward = lambda input_ids, **unused: first(states=other.get_input_embeddings()(input_ids))
    with pytest.raises(NoChain, match="not called with hidden states"):
        blocks_of(other).check(TOKENS[:1])


def test_relative_error_counts_every_token_alike():
    target = torch.randn(2, 5, 8)
    student = target + 0.1 * target.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(
        torch.randn(2, 5, 8), dim=-1
    )
    target[0, 0] *= 1e4  # a massive activation, as far off as all others
    student[0, 0] *= 1e4
    torch.testing.assert_close(relative_error(student, target), torch.tensor(0.01))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_tuning_brings_every_block_nearer(family, tmp_path):
    dense = build(family)
    asked = config(bpw=1.5, init="admm", steps=20)
    recipe = Recipe(epochs=4, distillation=None, allocation_rows=0)
    model = refine(copy.deepcopy(dense), asked, TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    figures = json.loads((tmp_path / "done.json").read_text())
    assert [block["steps"] for block in figures] == [72, 72]
    for block in figures:
        assert block["after"] < 0.95 * block["before"], block
        assert 0 < block["flipped"] < 0.5 and block["undone"] == 0
    assert all(not module.latent for module in factor_modules(model).values())
    with torch.no_grad():
        tuned = (model(TOKENS).logits - dense(TOKENS).logits).norm()
        start = refine(
            copy.deepcopy(dense),
            asked,
            TOKENS,
            recipe=replace(recipe, rates=Rates(0.0, 0.0, 0.0)),
            progress=False,
        )
        untuned = (start(TOKENS).logits - dense(TOKENS).logits).norm()
    assert tuned < 0.9 * untuned


def test_one_huge_token_is_not_all_that_is_refined():
    """A massive activation: the first token of every text has a hidden state a thousand times larger than the others."""
    tokens = torch.randint(4, 128, (72, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 3
    dense = build("llama")
    dense.get_input_embeddings().weight.data[3] *= 1000
    asked = config(bpw=2.0, init="admm", steps=10)
    alone = latent_model(copy.deepcopy(dense), asked, progress=False)
    refined = refine(copy.deepcopy(dense), asked, tokens[:64], recipe=BLOCKS_ALONE, progress=False)
    with torch.no_grad():
        wanted, *found = (model(tokens[64:]).logits[:, 1:] for model in (dense, alone, refined))
    errors = [(each - wanted).norm() for each in found]
    assert errors[1] < 0.85 * errors[0]


def test_best_state_is_kept_and_bad_steps_are_not_taken():
    """One layer that starts at its best: rates that throw it about must not be kept, and a NaN must not reach it."""
    model = build("llama")
    block = latent_model(model, config(), progress=False).model.layers[0].mlp
    x = torch.randn(12, 6, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        best = block(x)
    start = copy.deepcopy(block.state_dict())
    poisoned = []

    def forward(rows):
        out = block(x[rows])
        if torch.is_grad_enabled() and len(poisoned) < 2:
            poisoned.append(rows)
            return out * float("nan")
        return out

    outcome = tune_block(block, forward, lambda rows: best[rows], 12, 2, 10, 2, Rates(1.0, 1.0, 1.0), seed=0)
    assert outcome.undone == 2 and outcome.steps == 8
    assert outcome.before == outcome.after == 0.0 and outcome.flipped == 0.0
    assert all(torch.equal(value, start[name]) for name, value in block.state_dict().items())


def test_routers_stay_and_embeddings_if_asked(tmp_path):
    dense = build("qwen3_moe")
    recipe = Recipe(epochs=1, distillation=Schedule(0.5, embeddings=False))
    model = refine(copy.deepcopy(dense), config(), TOKENS, recipe=recipe, progress=False)
    kept = {name: value for name, value in dense.state_dict().items() if "gate.weight" in name or "embed" in name}
    assert len(kept) == 3
    for name, value in kept.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_experts_without_tokens_are_named(caplog):
    model = build("mixtral")
    for layer in model.model.layers:  # the router never takes the last expert
        with torch.no_grad():
            layer.mlp.gate.weight[-1] = 0
            layer.mlp.gate.weight[:-1].abs_()
        layer.mlp.gate.forward = _routed_to_the_first_three(layer.mlp.gate.forward)
    refine(model, config(), TOKENS, recipe=BLOCKS_ALONE, progress=False)
    named = [record.getMessage() for record in caplog.records if "no token" in record.getMessage()]
    assert len(named) == 2 and "model.layers.0.mlp.experts[3]" in named[0] and "experts[2]" not in named[0]


def _routed_to_the_first_three(forward):
    def routed(*args, **kwargs):
        logits, weights, index = forward(*args, **kwargs)
        return logits, weights, torch.where(index == 3, 0, index)

    return routed


def test_distillation_takes_the_dense_models_tokens(tmp_path):
    dense = build("llama")
    model = refine(
        copy.deepcopy(dense),
        config(),
        TOKENS,
        recipe=Recipe(epochs=1, distillation=Schedule(1)),
        folder=tmp_path,
        progress=False,
    )
    teacher = TopKTeacher(tmp_path / "teacher")
    with torch.no_grad():
        logits = dense(TOKENS).logits
    found = teacher(TOKENS, None, logits)
    expected = logits.log_softmax(-1).flatten(0, 1).topk(64)
    torch.testing.assert_close(
        found.logprobs, expected.values, atol=0.02, rtol=0
    )  # fp16, and bf16 where the CPU has it
    assert model.config.quantization_config.format == "packed" and model.dtype == dense.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_read_back(dtype, tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    model = refine(
        load(tmp_path / "dense", dtype=dtype),
        config(),
        TOKENS,
        recipe=Recipe(epochs=1, distillation=Schedule(0.2)),
        progress=False,
    )
    assert model.dtype == dtype and model.get_input_embeddings().weight.dtype == dtype
    kept = dict(build("llama").named_parameters())
    floats = {name: value for name, value in model.named_parameters() if name in kept and value.is_floating_point()}
    assert len(floats) == 7 and all(value.requires_grad for value in floats.values())
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS[:2]).logits, model(TOKENS[:2]).logits, atol=0, rtol=0)


def test_fp16_and_layer_norms_on_a_cpu_that_computes_in_bf16(monkeypatch):
    """Its autocast leaves LayerNorms bf16 products beside weights in fp16, which torch refuses (Pythia and OPT have both)."""
    monkeypatch.setattr("hf_littlebit.refinement.refinement.compute_dtype", lambda device: torch.bfloat16)
    dense = build("opt")
    loss = {}
    for dtype in (torch.float32, torch.float16):
        model = refine(copy.deepcopy(dense).to(dtype), config(bpw=2.0), TOKENS, recipe=Recipe(epochs=1), progress=False)
        assert model.dtype == dtype
        with torch.no_grad():
            loss[dtype] = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    assert loss[torch.float16] == pytest.approx(loss[torch.float32], rel=0.02)


def test_what_cannot_be_refined_is_refused(tmp_path):
    model = build("llama")
    for data, message in (
        ("corpus.txt", "text_blocks"),
        (TOKENS.float(), "must be tokens"),
        (TOKENS[:1], "at least 2"),
        (TOKENS + 100, "128; use the model's own"),
        (TOKENS.long() + 2**32, "which no vocabulary has"),
        (TOKENS.bool(), "must be tokens"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS.ne(5)}, "data has padding"),
        ([{"input_ids": [5] * 8, "attention_mask": [1] * 7 + [0]}] * 4, "data has padding"),
        (["Once upon a time"] * 2, "no list of tokens"),
        ([{"text": "Once"}] * 2, "no input_ids"),
        (None, "NoneType"),
        (iter([TOKENS[0]]), "iterator"),
        ([], "at least 2"),
        ([TOKENS[0], TOKENS[1][:5]], "one length"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(model, config(), data, progress=False)
    with pytest.raises(ValueError, match="no causal language model"):
        refine(build("bert"), config(), TOKENS, progress=False)
    refine(model, config(), TOKENS, recipe=BLOCKS_ALONE, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="already"):
        refine(model, config(), TOKENS, progress=False)
    with pytest.raises(ValueError, match="text"):
        refine(build("llama"), config(), TOKENS.flip(0), recipe=BLOCKS_ALONE, folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: Recipe(batch=0), "batch is 0"),
        (lambda: Recipe(length=1), "length is 1"),
        (lambda: Recipe(epochs=0), "epochs is 0"),
        (lambda: Recipe(allocation_rows=-1), "allocation_rows is -1"),
        (lambda: Schedule(batch=0), "batch is 0"),
        (lambda: Schedule(epochs=0.0), "leaves it out"),
        (lambda: Schedule(rest=-1e-4), "learning rate"),
    ],
)
def test_impossible_numbers_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_a_model_with_several_embeddings_for_its_tokens_is_refused(monkeypatch):
    """As Musicgen's decoder has: one for each of its codebooks."""
    model = build("llama")
    several = nn.ModuleList([model.model.embed_tokens])
    monkeypatch.setattr(model, "get_input_embeddings", lambda: several, raising=False)
    with pytest.raises(ValueError, match="reads its tokens by a ModuleList, and refinement by one embedding"):
        refine(model, config(), TOKENS, progress=False)


def test_rows_of_any_length_are_cut_into_long_pieces():
    for length, shape in ((512, (200, 256)), (257, (200, 128)), (509, (200, 254)), (300, (200, 150)), (97, (100, 97))):
        tokens = torch.arange(100 * length, dtype=torch.int32).view(100, length)
        rows = block_rows(tokens, Recipe(block_tokens=100 * length))
        assert rows.shape == shape and torch.equal(rows[0], tokens[0, : shape[1]])


def test_blocks_of_other_states_are_no_chain(monkeypatch):
    """Hidden states [length, rows, size] pass from block to block, and are not what rows are taken of."""
    model = build("llama")
    for block in model.model.layers:
        monkeypatch.setattr(block, "forward", lambda hidden_states, **unused: hidden_states)
    embed = model.model.embed_tokens.forward
    monkeypatch.setattr(model.model.embed_tokens, "forward", lambda tokens: embed(tokens).transpose(0, 1))
    with pytest.raises(NoChain, match=r"2 rows of 24 tokens: \(24, 2, 64\)"):
        refine(model, config(), TOKENS, recipe=BLOCKS_ALONE, progress=False)


def test_a_router_that_returns_its_choice_is_not_measured():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    layers = {"router": Router(4, 2), "plain": nn.Linear(4, 2)}
    recorder = Recorder(layers)
    for layer in layers.values():
        layer(torch.ones(3, 4))
    assert list(recorder.result()) == ["plain.weight"]


def test_the_cache_is_as_it_was_and_nothing_is_printed(capfd):
    model = refine(build("llama"), config(seed=2**40), TOKENS, recipe=Recipe(epochs=0.1), progress=False)
    assert model.config.use_cache is True and not capfd.readouterr().out


def test_rows_of_a_dataset_are_tokens():
    batch = {"input_ids": TOKENS, "attention_mask": TOKENS > 0}
    assert torch.equal(as_tokens(batch), TOKENS.to(torch.int32))
    rows = [{"input_ids": row.tolist(), "labels": row} for row in TOKENS]
    assert torch.equal(as_tokens(rows), TOKENS.to(torch.int32))


def test_a_refinement_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    recipe = Recipe(epochs=1, distillation=Schedule(1))
    whole = refine(build("llama"), config(), TOKENS, recipe=recipe, progress=False)
    calls = []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tuning.tune_block(*args, **kwargs)

    monkeypatch.setattr(block_work, "tune_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        refine(build("llama"), config(), TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    again = refine(build("llama"), config(), TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    assert len(calls) == 3  # the first block was not tuned again
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_refinement_goes_on_without_the_distillation(tmp_path, monkeypatch):
    """For which there is no memory, as turns out when all blocks are done."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("of CUDA")

    begun = {"recipe": Recipe(epochs=1), "folder": tmp_path, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(refinement, "distil", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"of CUDA\. All blocks are kept.*--distill-epochs 0"):
            refine(build("llama"), config(), TOKENS, **begun)
    done = (tmp_path / "done.json").read_text()
    with pytest.raises(ValueError, match="started with the distillation"):
        refine(build("llama"), config(), TOKENS, **{**begun, "recipe": Recipe(epochs=1, distillation=Schedule(2.0))})
    with pytest.raises(ValueError, match="the shape of the text"):
        refine(build("llama"), config(), TOKENS.view(10, 48), **begun)
    model = refine(build("llama"), config(), TOKENS, **{**begun, "recipe": BLOCKS_ALONE})
    assert (tmp_path / "done.json").read_text() == done
    equal_states(model, refine(build("llama"), config(), TOKENS, recipe=BLOCKS_ALONE, progress=False))


def test_one_gpu_of_several_is_used(monkeypatch):
    """Trainer would take them all, unless it is told that there is one."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 1 if self.__dict__.get("_n_gpu") == 1 else 2))
    recipe = Recipe(epochs=1, distillation=Schedule(0.2))
    refine(build("llama"), config(), TOKENS, recipe=recipe, progress=False)
    with pytest.raises(ValueError, match=r"device is cuda:1.*CUDA_VISIBLE_DEVICES=1"):
        refine(build("llama"), config(), TOKENS, recipe=recipe, device="cuda:1", progress=False)


def test_long_texts_are_read_once_and_short_ones_four_times():
    for rows, length, kept, steps in ((100, 512, 100, 400), (768, 512, 768, 1536), (5000, 512, 1536, 1536)):
        tokens = torch.zeros(rows, length)
        distilled = distilled_rows(tokens, Schedule())
        assert len(distilled) == kept and Schedule().steps(*distilled.shape) == steps
        assert (
            distilled_rows(tokens, Schedule(epochs=2)) is tokens and Schedule(epochs=2).steps(rows, length) == 2 * rows
        )
    assert Schedule(batch=2).steps(100, 512) == 200
    assert TOKENS_READ == SEEN  # of text, and learnt: the command line says the number without importing torch


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_embedding_and_head_move_where_there_is_room(family, monkeypatch, caplog):
    found = {}
    dense = build(family)
    enough = distillation.memory_needed(dense, plan_model(dense, config(format="latent")), embeddings=False) + 1
    for free in (1e12, enough):
        monkeypatch.setattr(distillation, "free_memory", lambda device, free=free: free)
        dense = build(family)
        before = [dense.get_input_embeddings().weight.clone(), dense.get_output_embeddings().weight.clone()]
        recipe = Recipe(epochs=0.2, distillation=Schedule(0.5), allocation_rows=0)
        model = refine(dense, config(), TOKENS, recipe=recipe, progress=False)
        after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        assert (after[0] is after[1]) == (family == "llama_tied")
        found[free] = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert found == {1e12: [True, True], enough: [False, False]}
    assert "embedding and head stay as they are" in caplog.text and "left out" not in caplog.text


def test_what_moves_is_decided_once(tmp_path, monkeypatch):
    recipe = Recipe(epochs=0.2, distillation=Schedule(1), allocation_rows=0)
    dense = build("llama")
    enough = distillation.memory_needed(dense, plan_model(dense, config(format="latent")), embeddings=False) + 1
    before = dense.get_input_embeddings().weight.clone()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "free_memory", lambda device: enough)
        patch.setattr(refinement, "distil", killed)
        with pytest.raises(KeyboardInterrupt):
            refine(dense, config(), TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    model = refine(build("llama"), config(), TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("schedule", [Schedule(0.2), None], ids=["distilled", "blocks alone"])
def test_a_refined_model_drops_nothing_out(tmp_path, schedule):
    model = refine(build("opt"), config(), TOKENS, recipe=Recipe(epochs=0.2, distillation=schedule), progress=False)
    assert model.config.dropout > 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(TOKENS[:2]).logits, model(TOKENS[:2]).logits)


def test_embeddings_that_moved_are_packed(tmp_path):
    recipe = Recipe(epochs=0.2, distillation=Schedule(0.5))
    options = config(embedding_bits=8, head_bits=8)
    model = refine(build("llama"), options, TOKENS, recipe=recipe, progress=False)
    assert "bits=8" in repr(model.get_input_embeddings()) and "bits=8" in repr(model.get_output_embeddings())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(TOKENS[:2]).logits, model(TOKENS[:2]).logits)


@pytest.mark.parametrize("schedule", [Schedule(0.2, embeddings=False), None], ids=["distilled", "blocks alone"])
def test_a_head_of_4_bits_is_rounded_for_the_text(monkeypatch, schedule):
    given = []

    def quantize(weight, bits, **options):
        given.append((weight.clone(), options.pop("moment")))
        return quantize_table(weight, bits, **options, moment=given[-1][1])

    monkeypatch.setattr(tables, "quantize_table", quantize)
    recipe = Recipe(epochs=0.2, distillation=schedule)
    model = refine(build("llama"), config(embedding_bits=8, head_bits=4), TOKENS, recipe=recipe, progress=False)
    (_, none), (weight, moment) = given
    assert none is None and torch.equal(weight.float(), build("llama").lm_head.weight)
    assert torch.equal(model.lm_head.table()[0], quantize_table(weight, 4, moment=moment).codes)
    batches = [{"input_ids": row[None].long()} for row in spread_rows(TOKENS, 32)]
    assert moment.dtype == torch.float32
    assert (head_moment(model, batches) - moment).norm() < 0.05 * moment.norm()


def test_without_memory_the_distillation_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(distillation, "free_memory", lambda device: 1e9)
    model = refine(build("llama"), config(), TOKENS, recipe=Recipe(epochs=0.2), progress=False)
    assert "2.0 GB of memory, and 1.0 GB are free" in caplog.text
    assert model.config.quantization_config.format == "packed"


def test_bits_go_where_they_save_most():
    """Costs that are exponential in the bits: at the best shares one more bit saves the same everywhere."""
    costs, sizes = [0.6, 0.5, 0.5], [100, 100, 200]
    bits = shares(costs, sizes, 1.0, [9.0] * 3)
    assert sum(b * n for b, n in zip(bits, sizes, strict=True)) == pytest.approx(400)
    saved = [c * math.exp(-SLOPE * (b - 1)) / n for c, b, n in zip(costs, bits, sizes, strict=True)]
    assert bits[0] > bits[1] and saved == pytest.approx([saved[0]] * 3)
    assert shares([1e9, 1e-9], [1, 1], 1.0, [9.0] * 2) == pytest.approx([1.4, 0.6])  # the limit of the poorer
    assert shares([1e9, 1e-9], [1, 1], 1.0, [1.25, 9.0]) == pytest.approx([1.25, 0.75])  # of the richer's rank
    assert shares([0.0, 0.0], [2, 2], 0.5, [9.0] * 2) == pytest.approx([0.5, 0.5], rel=1e-3)


def test_bits_are_shared_by_the_costs_and_recorded(tmp_path):
    dense = build("llama")
    recipe = Recipe(epochs=0.1, distillation=None, allocation_rows=4)
    asked = config(bpw=1.2, init="admm", steps=5)
    model = refine(copy.deepcopy(dense), asked, TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    plain, found = plan_model(dense, asked), plan_model(dense, model.config.quantization_config)
    assert 0.97 < found.bits / plain.bits <= 1
    options = model.config.quantization_config.module_config
    assert sorted(options) == ["model.layers.0.*", "model.layers.1.*"]
    assert json.loads((tmp_path / "allocation.json").read_text()) == options
    tokens = block_rows(TOKENS, recipe)[[0, 5, 10, 15]]
    costs = costs_of(dense, tokens)
    bits = [options[name]["bpw"] for name in sorted(options)]
    assert (costs[0] > costs[1]) == (bits[0] > bits[1]) and costs[0] != costs[1]


def test_a_block_that_stays_dense_has_no_share(tmp_path):
    recipe = Recipe(epochs=0.1, distillation=None, allocation_rows=4)
    asked = config(bpw=1.2, modules_to_not_convert=["model.layers.0.*"])
    model = refine(build("llama"), asked, TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    assert list(model.config.quantization_config.module_config) == ["model.layers.1.*"]


@pytest.mark.parametrize("options", [{"bpw": 3.2}, {"bpw": 1.2, "ranks": {"*.up_proj": [24]}}])
def test_bits_that_cannot_be_shared_are_not(options, tmp_path):
    """More than the layers can use, and ranks that were asked for."""
    recipe = Recipe(epochs=0.1, distillation=None)
    model = refine(build("llama"), config(**options), TOKENS, recipe=recipe, folder=tmp_path, progress=False)
    assert not model.config.quantization_config.module_config
    assert not (tmp_path / "allocation.json").exists()


@pytest.mark.parametrize("bpw", [0.1, 0.2, 0.3, 0.55])
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_shared_bits_are_as_many_as_were_asked(bpw, spread):
    """Also of a small model, whose ranks come in coarse steps."""
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128))
    asked = LittleBitConfig(bpw=bpw)
    plan = plan_model(model, asked)
    blocks = find_blocks(model, [weight.module for weight in plan.weights])
    assert can_share(asked, plan, blocks)
    found = plan_model(model, allocate(model, asked, blocks, [math.exp(spread * at) for at in (0, 2, 1, -1)]))
    assert 0.993 * plan.bits < found.bits <= plan.bits


@pytest.mark.parametrize(("residual", "full"), [(False, 1.5), (True, 3.0)])
def test_full_ranks_of_all_paths_can_be_used(residual, full):
    """Of layers of 32 x 64, one path's signs at full rank are 1.5 bits per weight."""
    model = build("llama")
    for bpw, can in ((0.9 * full, True), (1.1 * full, False)):
        asked = config(bpw=bpw, residual=residual)
        assert can_share(asked, plan_model(model, asked), blocks_of(model)) is can


def test_costs_that_are_no_numbers_are_refused():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="next tokens NaN or Inf"):
        costs_of(model, TOKENS[:3])


def costs_of(model, tokens, seed=0):
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "progress": False}
    return measure_costs(blocks_of(model), tokens, seed=seed, **options)


def test_costs_are_those_of_an_error_of_the_blocks_change():
    """The KL for a disturbed output of one block: nothing for a block that changes nothing, and what it comes to by hand."""
    model = build("llama")
    tokens = TOKENS[:3].long()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    costs = costs_of(model, tokens)
    assert min(costs) > 0 and costs == costs_of(model, tokens) and costs != costs_of(model, tokens, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    states = {}
    handle = model.model.layers[1].register_forward_hook(lambda module, args, out: states.update(x=args[0], y=out))
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
    handle.remove()
    generator = torch.Generator().manual_seed(0)
    torch.randn(states["y"].shape, generator=generator)  # the first block's
    error = torch.nn.functional.normalize(torch.randn(states["y"].shape, generator=generator), dim=-1)
    size = (states["y"] - states["x"]).norm(dim=-1, keepdim=True) * NOISE**0.5
    with torch.no_grad():
        got = model.lm_head(model.model.norm(states["y"] + size * error)).log_softmax(-1)
    assert costs[1] == pytest.approx(float((expected.exp() * (expected - got)).sum(-1).mean()), rel=1e-3)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[0].get_submodule(name).weight.zero_()
    assert costs_of(model, tokens)[0] == pytest.approx(0, abs=1e-7)


def test_latents_settle_before_the_whole_model_is_trained():
    model = latent_model(build("llama"), config(init="admm", steps=5), progress=False)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.v[0, :4] = torch.tensor([1e-6, -1e-6, 0.0, 1.0])
        before = layer.v.clone()
    settle_latents(model)
    floor = 0.25 * before.abs().median()
    assert torch.equal(layer.v < 0, before < 0)
    assert layer.v.abs().min() == floor and layer.v[0, 2] == floor and layer.v[0, 3] == 1.0
    large = before.abs() > floor
    assert torch.equal(layer.v[large], before[large])


def test_the_time_is_foretold_from_the_first_block_that_is_quantized(capfd):
    skipped = config(modules_to_not_convert=["model.layers.0"])
    refine(build("llama"), skipped, TOKENS, recipe=BLOCKS_ALONE, progress=True)
    assert capfd.readouterr().err.count("about 0 minutes for the other blocks") == 1
