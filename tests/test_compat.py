"""Other versions of transformers: the cache under either name, what is said about versions too new, and the pinned sets."""

import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from families import config, load
from transformers import AutoTokenizer

from hf_littlebit import compat
from hf_littlebit.train.data import sample_blocks

ROOT = Path(__file__).parent.parent


class Output(dict):
    """What a model returns: a dict of which the logits are an attribute too."""

    logits = property(lambda self: self["logits"])


class Renamed(torch.nn.Module):
    """A model that takes its cache as `accepted`, swallows any other name, and returns it as `returned`."""

    def __init__(self, model, accepted, returned):
        super().__init__()
        self.model, self.returned, self.lengths = model, returned, []
        self.own = next(name for name in compat.CACHE_NAMES if name in tuple(model(torch.tensor([[1]])).keys()))
        self.forward = {
            "cache": lambda input_ids, cache=None, **kwargs: self.step(input_ids, cache),
            "past_key_values": lambda input_ids, past_key_values=None, **kwargs: self.step(input_ids, past_key_values),
            None: lambda input_ids, **kwargs: self.step(input_ids, None),
        }[accepted]

    def step(self, input_ids, state):
        self.lengths.append(input_ids.shape[1])
        out = self.model(input_ids=input_ids, use_cache=True, **{self.own: state})
        return Output({"logits": out.logits} | ({self.returned: out[self.own]} if self.returned else {}))

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()


@pytest.fixture(scope="module")
def start(stories):
    return AutoTokenizer.from_pretrained(stories)


def follows_from_its_past(model, rows):
    """Whether every token is the likeliest one after all tokens before it, by one pass without a cache."""
    with torch.no_grad():
        likeliest = model.eval()(input_ids=rows.long(), use_cache=False).logits.argmax(-1)
    return torch.equal(likeliest[:, :-1], rows[:, 1:].long())


def test_own_text_follows_from_its_past(stories, start):
    teacher = load(stories)
    rows = sample_blocks(teacher, start, 2, 48, temperature=1e-4, progress=False).tokens
    assert follows_from_its_past(teacher, rows)
    # One token of context only, as with a swallowed cache, gives another text.
    last = rows[:, :1]
    while last.shape[1] < 48:
        last = torch.cat([last, teacher(input_ids=last[:, -1:].long()).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert not follows_from_its_past(teacher, last)


@pytest.mark.parametrize(
    ("accepted", "returned"),
    [
        ("cache", "cache"),  # from 5.24 on, and after the old name is gone
        ("past_key_values", "past_key_values"),  # until 5.23
        ("past_key_values", "cache"),  # a model of the old form with the output class of 5.24
    ],
)
def test_the_cache_under_either_name(stories, start, accepted, returned):
    teacher = load(stories)
    renamed = Renamed(teacher, accepted, returned)
    rows = sample_blocks(renamed, start, 1, 24, temperature=1e-4, progress=False).tokens
    assert follows_from_its_past(teacher, rows) and renamed.lengths == [1] * 23


def test_without_a_cache_all_tokens_are_computed_again(stories, start):
    teacher = load(stories)
    renamed = Renamed(teacher, None, None)
    rows = sample_blocks(renamed, start, 1, 24, temperature=1e-4, progress=False).tokens
    assert follows_from_its_past(teacher, rows) and renamed.lengths == list(range(1, 24))


@pytest.mark.parametrize("returned", compat.CACHE_NAMES)
def test_a_swallowed_cache_is_an_error(stories, start, returned):
    with pytest.raises(RuntimeError, match=rf"Renamed ignored the cache that it was given as '{returned}'.*5\.17 to"):
        sample_blocks(Renamed(load(stories), None, returned), start, 1, 24, progress=False)


@pytest.fixture
def unchecked():
    """The check of transformers runs again, and once more afterwards for the other tests."""
    compat.check_transformers.cache_clear()
    yield
    compat.check_transformers.cache_clear()


@pytest.mark.parametrize(("version", "warnings"), [("5.24.9", 0), ("5.25.0.dev0", 1), ("6.0.0rc1", 1), ("5.17.0", 0)])
def test_a_newer_transformers_is_mentioned_once(unchecked, stories, monkeypatch, caplog, version, warnings):
    monkeypatch.setattr(compat.transformers, "__version__", version)
    with caplog.at_level(logging.WARNING, "hf_littlebit"):
        for _ in range(2):
            load(stories, quantization_config=config())
    found = [record.getMessage() for record in caplog.records if "tested" in record.getMessage()]
    assert len(found) == warnings
    assert all(f"transformers {version} is installed" in text and "5.17 to 5.24" in text for text in found)
    assert all("pip install 'transformers>=5.17,<5.25'" in text for text in found)


def test_a_missing_method_is_an_error_with_a_remedy(unchecked, stories, monkeypatch):
    monkeypatch.delattr("transformers.modeling_utils.PreTrainedModel.mark_tied_weights_as_initialized")
    with pytest.raises(
        RuntimeError, match=r"PreTrainedModel.mark_tied_weights_as_initialized.*is installed.*pip install"
    ):
        load(stories, quantization_config=config())


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers.core_model_loading", "ConversionOps"),  # fails in an import statement
        ("transformers.quantizers.auto", "AUTO_QUANTIZER_MAPPING"),  # fails while registering
        ("transformers.trainer", "DEFAULT_CALLBACKS"),  # fails where transformers itself reads it
        ("json", "dumps"),  # no fault of transformers
    ],
)
def test_what_an_import_lacks_is_explained(module, name):
    code = (
        f"import transformers.trainer, {module} as m; del m.{name}\n"
        "try:\n    import hf_littlebit; hf_littlebit.LittleBitTrainer\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = f"transformers {transformers.__version__} is installed, and this hf-littlebit is tested with" in done.stdout
    if name in ("ConversionOps", "AUTO_QUANTIZER_MAPPING"):
        assert said and name in done.stdout, done.stdout + done.stderr
    else:
        assert not said, done.stdout


def pins(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", line) for line in lines), lines  # no local versions
    return dict(line.split("==") for line in lines)


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)]


def test_the_pinned_versions_cover_what_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["optimum"], *extras["train"]]
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    for requirement in declared:
        name, _, bound = requirement.partition(">=")
        name = name.replace("_", "-")
        assert numbers(newest[name]) >= numbers(bound), requirement
        if bound:
            least, found = numbers(bound), numbers(oldest[name])
            assert found[: len(least)] == least and not any(found[len(least) :]), (
                f"{requirement}: {oldest[name]} is pinned"
            )
    assert tuple(numbers(oldest["transformers"])[:2]) == compat.TESTED[0]
    assert tuple(numbers(newest["transformers"])[:2]) == compat.TESTED[1]


def test_the_documents_say_what_is_pinned():
    row = re.compile(r"^\| ([\w, ]+) \| ([\d., ]+)(?: \(CPU\))? \| ([\d., ]+)(?: \(CPU\))? \|$", re.MULTILINE)
    rows = row.findall((ROOT / "docs" / "coverage.md").read_text())
    said = {names.replace("_", "-"): versions for names, *versions in rows}
    for names in ("transformers", "torch", "huggingface-hub, accelerate, safetensors"):
        for file, versions in zip(("constraints-oldest.txt", "constraints.txt"), said[names], strict=True):
            assert versions == ", ".join(pins(file)[name] for name in names.split(", "))
    (low, high), torch_versions = said["transformers"], dict.fromkeys(said["torch"])
    assert f"transformers {low} to {high} and torch {' to '.join(torch_versions)} (" in (ROOT / "README.md").read_text()
