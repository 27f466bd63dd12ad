"""How long a refinement takes is foretold from one block, whatever its share of the bits."""

import pytest
from families import build, config

from hf_littlebit.plan import plan_model
from hf_littlebit.refinement.distillation import Schedule
from hf_littlebit.refinement.forecast import blocks_left, distillation, work_of
from hf_littlebit.weight_plan import WeightPlan


def block(rank):
    return [WeightPlan("block.0", "weight", 1000, 1000, (rank,), config())]


def test_blocks_with_more_latents_take_longer():
    # Ranks of half the inputs have as many latents as there are weights, so as much again.
    work = [work_of(block(rank)) for rank in (500, 250, 0, 1000)]
    assert work == [2e6, 1.5e6, 1e6, 3e6]
    assert blocks_left(work, 0, 10.0) == pytest.approx(27.5)
    assert blocks_left(work, 1, 7.5) == pytest.approx(20.0)
    assert blocks_left(work, 3, 15.0) == 0


def test_any_block_foretells_the_same_distillation():
    model = build("llama")
    plan = plan_model(model, config())
    assert work_of(plan.weights) > sum(weight.numel for weight in plan.weights)
    work, schedule = [2e6, 1e6], Schedule(epochs=2, batch=4)
    first, second = (
        distillation(work, index, per_token, model, schedule, 20, 24) for index, per_token in ((0, 2e-3), (1, 1e-3))
    )
    head = model.get_output_embeddings().weight.numel()
    assert first == second == pytest.approx(10 * 4 * 24 * 1e-3 * (3e6 + head) / 1e6)
    at_rest = distillation(work, 1, 1e-3, model, Schedule(epochs=2, batch=4, embeddings=False), 20, 24)
    assert first - at_rest == pytest.approx(10 * 4 * 24 * 1e-3 * head / 3 / 1e6)
