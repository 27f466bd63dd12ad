"""Bits per weight are a promise about the model: ranks together take what was asked, and the config says which they are."""

import pytest
import torch
import transformers
from families import FAMILIES, ROOT, SMALL, build, config, equal_states, load, logits

from hf_littlebit import LittleBitConfig, size_report
from hf_littlebit.budget import Share, meet_budget
from hf_littlebit.config import LayerConfig
from hf_littlebit.load.meta_model import empty_model
from hf_littlebit.module_names import matches
from hf_littlebit.plan import Plan, plan_model
from hf_littlebit.weight_plan import WeightPlan

# As wide as models of a hundred million parameters; the families of the other tests have layers of 64 x 32.
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "head_dim": 64, "num_attention_heads": 8, "num_hidden_layers": 3}
WIDE |= {"moe_intermediate_size": 256, "ffn_dim": 2048, "word_embed_proj_dim": 512}


def wide(family):
    name, options = FAMILIES[family]
    model_class = getattr(transformers, name)
    return empty_model(model_class.config_class(**{**SMALL, **options, **WIDE, "architectures": [name]}))


@pytest.mark.parametrize("bpw", [0.3, 0.55, 1.0])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_takes_the_bits_asked(family, bpw):
    plan = plan_model(wide(family), LittleBitConfig(bpw=bpw))
    assert 0.99 * bpw <= plan.bpw <= bpw
    assert not any("bits asked" in message for message in plan.warnings())


@pytest.mark.parametrize("name", ["llama2-7b", "llama-3.2-1b"])
@pytest.mark.parametrize("bpw", [0.1, 0.55])
def test_so_does_a_real_one(name, bpw):
    report = size_report(ROOT / "examples" / "configs" / f"{name}.json", LittleBitConfig(bpw=bpw))
    assert 0.999 * bpw <= report.bpw <= bpw
    assert 8 * report.quantized_bytes == pytest.approx(report.bpw * report.replaced_weights)


def test_what_small_layers_take_too_much_others_give():
    """k and v of 192 rows cost 0.17 bits at the smallest rank."""
    shapes = {"q": (576, 576), "k": (192, 576), "up": (1536, 576)}
    shares = [Share(*size, 1, (8,) if name != "up" else (40,), 0.1) for name, size in shapes.items()]
    budget = sum(0.1 * share.numel for share in shares)
    found = [share._replace(ranks=ranks) for share, ranks in zip(shares, meet_budget(shares, budget), strict=True)]
    assert found[1].fill > 1.5 and found[2].ranks < (40,)
    assert sum(share.bits for share in found) <= budget
    # A step more of the layer that has least would be too much.
    least = min(found, key=lambda share: share.fill)
    assert sum(share.bits for share in found) + least.moved(1).bits - least.bits > budget


def test_where_floors_and_ceilings_forbid_it_a_user_is_told():
    floors = plan_model(build("llama"), LittleBitConfig(bpw=0.3))
    assert floors.bpw > 0.3 and {weight.ranks for weight in floors.weights} == {(8,)}
    (message,) = [each for each in floors.warnings() if "times the bits asked" in each]
    assert message.startswith(f"the weights take {floors.bpw / 0.3:.3g} times the bits asked")
    ceilings = plan_model(build("llama"), LittleBitConfig(bpw=8.0, residual=False))
    assert any("times the bits asked" in message for message in ceilings.warnings())


def test_what_was_asked_by_name_is_not_shared_out(pycode):
    model = empty_model(transformers.AutoConfig.from_pretrained(pycode))
    options = LittleBitConfig(bpw=0.55, kv_factor=2.0, module_config={"*.0.mlp.up_proj": {"bpw": 1.0}})
    plan = plan_model(model, options)
    named = {weight.spoken: weight for weight in plan.weights if not weight.options.shares}
    assert {name.rpartition(".")[2] for name in named} == {"k_proj", "v_proj", "up_proj"}
    assert all(w.ranks == w.options.ranks(w.out_features, w.in_features) for w in named.values())
    shared = [weight for weight in plan.weights if weight.options.shares]
    taken = sum(weight.bits for weight in shared) / sum(weight.numel for weight in shared)
    assert 0.99 * 0.55 < taken <= 0.55


def test_the_config_records_the_ranks_and_gives_them_back(pycode, tmp_path):
    model = load(pycode, quantization_config=LittleBitConfig(bpw=0.55, init="dual_svid", residual=False))
    recorded = model.config.quantization_config
    plan = plan_model(empty_model(transformers.AutoConfig.from_pretrained(pycode)), recorded)
    assert [weight.ranks for weight in plan.weights] == [
        tuple(model.get_submodule(weight.module).ranks) for weight in plan.weights
    ]
    assert len(recorded.ranks) < len(plan.weights) and not plan.unused
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    equal_states(model, again)
    assert again.config.quantization_config.ranks == recorded.ranks


def test_ranks_are_what_a_model_gets(family_dir, tmp_path):
    """Two paths of 24 and 8, which shapes alone would read as 16 and 16, and a stack of experts by the name of its weight."""
    ranks = {"*_proj": [16], "*.0.self_attn.q_proj": [24, 8], "*.experts.down_proj": [32]}
    model = load(family_dir("mixtral"), quantization_config=config(ranks=ranks))
    first = model.model.layers[0]
    assert first.self_attn.q_proj.ranks == [24, 8] and model.model.layers[1].self_attn.q_proj.ranks == [16]
    assert first.mlp.experts.path_ranks == {"gate_up_proj": [16], "down_proj": [32]}
    model.save_pretrained(tmp_path)
    equal_states(model, load(tmp_path))


@pytest.mark.parametrize("format", ["packed", "latent"])
def test_paths_of_unequal_ranks_are_saved_by_name(format, family_dir, tmp_path):
    """Shapes do not tell 24 + 8 from 16 + 16, and a file keeps its names in another order than the user wrote."""
    ranks = {"*.mlp.*": [24, 8], "*.self_attn.*": [24, 8], "*.layers.0.*": [16, 16]}
    model = load(family_dir("llama"), quantization_config=config(ranks=ranks, format=format))
    assert model.model.layers[0].mlp.up_proj.ranks == [16, 16] and model.model.layers[1].mlp.up_proj.ranks == [24, 8]
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    # Layers that change places, and one that goes, take their ranks along.
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[1], layers[0]])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.save_pretrained(tmp_path / "swapped")
    assert torch.equal(logits(load(tmp_path / "swapped")), logits(model))
    model.model.layers = model.model.layers[1:]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(load(tmp_path / "pruned")), logits(model))


def test_recorded_ranks_hold_in_the_order_of_their_names():
    """As a file has them; a pattern may be for the names of another one too."""
    sizes = (
        ("b.0.mlp.proj", 3),
        ("b.0.proj", 5),
        ("b.1.mlp.proj", 3),
        ("b.1.proj", 5),
        ("b.2.mlp.proj", 4),
        ("b.2.proj", 5),
    )
    weights = [
        WeightPlan(name, "weight", 64, 64, (8 * size,), LayerConfig(bpw=1.0, init="admm", residual=False, factor=1.0))
        for name, size in sizes
    ]
    found = Plan(weights).ranks()
    assert list(found) == sorted(found) and len(found) < len(weights)
    for name, size in sizes:
        assert [ranks for pattern, ranks in found.items() if matches(pattern, name)][-1] == [8 * size]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"q_proj": [12]}, "multiple of 8"),
        ({"q_proj": []}, "list of ranks"),
        ({"q_proj": 16}, "list of ranks"),
        ({"q_proj": [True]}, "list of ranks"),
        ({"": [8]}, "name pattern"),
        ([8], "a dict of name pattern"),
    ],
)
def test_what_are_no_ranks(ranks, message):
    with pytest.raises(ValueError, match=message):
        LittleBitConfig(bpw=1.0, ranks=ranks)


def test_ranks_beyond_a_layer_or_without_one():
    with pytest.raises(ValueError, match=r"k_proj \(32x64\) is given \[64\].*here 32"):
        plan_model(build("llama"), LittleBitConfig(bpw=1.0, ranks={"k_proj": [64]}))
    plan = plan_model(build("llama"), LittleBitConfig(bpw=2.5, ranks={"w2": [8]}))
    assert "ranks entry 'w2'" in plan.unused


def test_info_shows_the_plan(pycode):
    table = size_report(pycode, LittleBitConfig(bpw=0.55)).table()
    assert "model.layers.*.mlp.up_proj" in table and "ranks" in table
