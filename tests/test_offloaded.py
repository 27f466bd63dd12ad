"""Teachers and models whose weights are offloaded: each pass over one gives what it gives in memory."""

import accelerate
import pytest
import torch
from families import config, load
from transformers import AutoTokenizer

from hf_littlebit.initialize.calibration import calibrate
from hf_littlebit.train.data import sample_blocks
from hf_littlebit.train.topk import save_topk

TOKENS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(params=["dense", "packed"])
def folder(request, stories, tmp_path):
    if request.param == "dense":
        return stories
    load(stories, quantization_config=config()).save_pretrained(tmp_path / "packed")
    return str(tmp_path / "packed")


@pytest.fixture(params=["disk", "hooks"])
def offloaded(request, folder, tmp_path):
    """A function that loads the model anew: parts of it on the disk, or all of it fetched for every forward."""

    def made():
        if request.param == "hooks":
            model = load(folder, dtype=torch.float32)
            accelerate.cpu_offload(model, execution_device="cpu")
            return model
        layers = {f"model.layers.{index}": "disk" if index > 1 else "cpu" for index in range(5)}
        rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        model = load(folder, dtype=torch.float32, device_map={**rest, **layers}, offload_folder=tmp_path / "offload")
        assert any(value.is_meta for value in model.parameters())
        return model

    return made


def test_offloaded_models_teach_as_those_in_memory(offloaded, folder, stories, tmp_path):
    plain = load(folder, dtype=torch.float32)
    found, expected = (
        save_topk(model, [{"input_ids": TOKENS}], tmp_path / name, 8)
        for name, model in (("off", offloaded()), ("in", plain))
    )
    given = TOKENS, None, torch.zeros(1, 512)
    one, other = found(*given), expected(*given)
    assert torch.equal(one.tokens, other.tokens) and torch.isfinite(other.logprobs).all()
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=2e-3)
    tokenizer, cache = AutoTokenizer.from_pretrained(stories), tmp_path / "cache"
    found = sample_blocks(offloaded(), tokenizer, 3, 10, cache=cache, progress=False)
    assert torch.equal(sample_blocks(plain, tokenizer, 3, 10, progress=False).tokens, found.tokens)
    sample_blocks(plain, tokenizer, 3, 10, cache=cache, progress=False)
    assert len(list(cache.iterdir())) == 1  # it is known for the same teacher
    found, expected = (calibrate(model, [{"input_ids": TOKENS}]) for model in (offloaded(), plain))
    assert found.keys() == expected.keys() and expected
    for name, importance in expected.items():
        for one, other in zip(found[name], importance, strict=True):
            torch.testing.assert_close(one, other)
