"""Model cards, and pushes of models against a stub of the Hub's client."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from families import equal_states, load
from huggingface_hub import CommitOperationDelete, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from hf_littlebit import LittleBitConfig, size_report
from hf_littlebit.report.card import evaluation_of, merge, model_card, write_card
from hf_littlebit.report.size_report import format_bytes

AUTOMATIC = "This is the model card of a transformers model. This model card has been automatically generated."


class StubApi:
    """The calls of HfApi that an upload makes; what was uploaded is in `files`."""

    def __init__(self):
        self.files, self.created = {}, None

    def create_repo(self, repo_id, private=None, **unused):
        self.created = (repo_id, private)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **unused):
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del self.files[operation.path_in_repo]
                continue
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def list_repo_files(self, repo_id):
        return sorted(self.files)


def stub_hub(monkeypatch, tmp_path):
    """A StubApi in place of the Hub; its `card` is the card that the repository has."""
    stub = StubApi()
    stub.card = None

    def download(repo_id, filename, **unused):
        if stub.card is None:
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        path = tmp_path / "remote.md"
        path.write_text(stub.card)
        return str(path)

    monkeypatch.setattr(huggingface_hub.repocard, "hf_hub_download", download)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: stub)
    monkeypatch.setattr(transformers.modeling_utils, "hf_api", lambda: stub)
    return stub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    return stub_hub(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def model(family_dir):
    config = LittleBitConfig(bpw=4.0, init="dual_svid", base_model="org/small-llama")
    return load(family_dir("llama"), quantization_config=config)


def test_metadata_and_figures(model):
    report = size_report(model)
    written = model_card(model, "me/small", {"WikiText-2 perplexity": 12.3456})
    data = written.data.to_dict()
    assert data["base_model"] == "org/small-llama" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"littlebit", "sub-1-bit", "quantized"} <= set(data["tags"])
    for words in (
        f"| bits per weight asked              | {report.bpw_asked:g} ",
        f"{report.bpw:.4g}",
        f"({report.ratio:.1f} times larger)",
        "pip install hf-littlebit",
        "import hf_littlebit",
        'AutoModelForCausalLM.from_pretrained("me/small")',
        "Without the plugin, transformers refuses",
        "huggingface.co/papers/2506.13771",
        "| WikiText-2 perplexity | 12.35 ",
        "Dual-SVID",
    ):
        assert words in written.text, words
    assert "## Evaluation" not in model_card(model).text


def test_other_architectures(family_dir):
    bert = load(family_dir("bert"), quantization_config=LittleBitConfig(bpw=4.0, init="dual_svid"))
    written = model_card(bert, "me/bert")
    assert written.data.pipeline_tag == "fill-mask"
    assert 'BertForMaskedLM.from_pretrained("me/bert")' in written.text


@pytest.mark.parametrize("path", ["/home/someone/models/llama", "./models/llama", "C:\\models\\llama", "src"])
def test_no_local_path_in_the_card(family_dir, path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    config = LittleBitConfig(bpw=4.0, init="dual_svid", base_model=path)
    model = load(family_dir("llama"), quantization_config=config)
    content = model_card(model, "me/small").content
    assert "base_model" not in content and "someone" not in content and str(family_dir("llama")) not in content
    assert "models/llama" not in content


def test_dense_model_is_refused(family_dir):
    with pytest.raises(ValueError, match="the model is dense"):
        model_card(load(family_dir("llama")))


def test_push_replaces_the_automatic_card(model, hub):
    model.push_to_hub("me/small", private=True, tags=["mine"])
    assert set(hub.files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert hub.created == ("me/small", True)
    pushed = ModelCard(hub.files["README.md"].decode())
    assert "automatically generated" not in pushed.text and "[More Information Needed]" not in pushed.text
    assert {"mine", "littlebit"} <= set(pushed.data.tags)
    assert 'from_pretrained("me/small")' in pushed.text
    assert f"{len(hub.files['model.safetensors']) / 1e3:.2f} kB" in pushed.text  # the real file's size
    assert hub.files["config.json"].count(b"littlebit") and b"/tmp" not in hub.files["README.md"]


def test_save_with_push_leaves_the_rest_of_the_folder(model, hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("private")
    model.save_pretrained(folder, push_to_hub=True, repo_id="me/small")
    assert set(hub.files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert b"hf-littlebit" in hub.files["README.md"]


TABLES = {  # (family, embedding_bits, head_bits) -> what the card says of the tables
    ("llama", 8, 4): "`model.embed_tokens`: 8 bits; `lm_head`: 4 bits",
    ("llama", 16, 8): "(`lm_head`: 8 bits)",
    ("llama_tied", 4, 4): "`model.embed_tokens` and `lm_head`: 4 bits",
}


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("family, embedding, head", TABLES)
def test_packed_tables_are_pushed_with_their_figures(family_dir, hub, tmp_path, family, embedding, head, way):
    config = LittleBitConfig(bpw=4.0, init="dual_svid", embedding_bits=embedding, head_bits=head)
    model = load(family_dir(family), quantization_config=config)
    if way == "push_to_hub":
        model.push_to_hub("me/small")
    else:
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/small")
    assert set(hub.files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    equal_states(model, load(str(tmp_path)))
    report, card = size_report(str(tmp_path)), hub.files["README.md"].decode()
    assert report.whole_bpw > report.bpw and len(report.tables) == (2 if (family, embedding) == ("llama", 8) else 1)
    (line,) = (line for line in card.splitlines() if "of the whole model" in line)
    assert line.split("|")[2].strip() == f"{report.whole_bpw:.4g}"
    assert TABLES[family, embedding, head] in card
    for table in report.tables:
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {table.bits} bits "))
        assert table.described in line and all(name in line for name in table.modules)
    # Another push of what was downloaded changes nothing but the id of the save.
    before = dict(hub.files)
    load(str(tmp_path)).push_to_hub("me/small")
    assert hub.files.keys() == before.keys() and size_report(model).tables == report.tables
    assert len(hub.files["model.safetensors"]) == len(before["model.safetensors"])


def test_push_keeps_a_written_card(model, hub):
    hub.card = "---\nlicense: mit\ntags:\n- stories\nbase_model: other/origin\n---\n\n# Mine\n\nMy own words.\n"
    model.push_to_hub("me/small")
    pushed = ModelCard(hub.files["README.md"].decode())
    assert pushed.text.strip() == "# Mine\n\nMy own words."
    assert pushed.data.license == "mit" and pushed.data.base_model == "other/origin"
    assert pushed.data.tags[0] == "stories" and "littlebit" in pushed.data.tags
    assert pushed.data.library_name == "transformers" and pushed.data.pipeline_tag == "text-generation"
    # "quantized" is our base's relation, not that of the base which the author names.
    assert pushed.data.to_dict().get("base_model_relation") is None


def test_figures_with_bars_in_their_names(model):
    card = model_card(model, "me/small", {"perplexity a|b": 12.1, "n": 3})
    assert evaluation_of(card) == {"perplexity a|b": "12.1", "n": "3"}


@pytest.mark.parametrize(
    "text",
    [
        b"---\ntitle: my model: v2\n---\nnotes\n",
        "---\ntitle: café\n---\n".encode("latin-1"),
        b"---\n- a\n- b\n---\n",
        b"---\nmodel-index:\n- results: []\n---\n",
    ],
    ids=["yaml", "latin-1", "list", "model-index"],
)
def test_a_card_that_cannot_be_read_stays_as_it_is(model, tmp_path, caplog, text):
    """The model, which took hours perhaps, is saved all the same."""
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(text)
    write_card(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == text
    assert "README.md stays as it is: it cannot be read as a model card" in caplog.text


def test_the_files_size_is_that_of_this_save(model, hub, tmp_path):
    model.save_pretrained(tmp_path)
    alone = size_report(str(tmp_path)).file_bytes
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "adapter_model.safetensors")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/small")
    assert format_bytes(alone) in hub.files["README.md"].decode()


def test_a_second_push_renews_our_own_card_only(model, hub):
    hub.card = model_card(model, "me/small", {"old figure": 1}).content
    model.push_to_hub("me/small")
    assert b"old figure" not in hub.files["README.md"]
    hub.card = hub.card.replace("## Limits", "## My limits")
    model.push_to_hub("me/small")
    assert b"## My limits" in hub.files["README.md"] and b"old figure" in hub.files["README.md"]


def test_filled_in_template_is_kept(model):
    template = ModelCard.from_template(ModelCardData(license="mit"), model_description=AUTOMATIC)
    template.text = template.text.replace("[More Information Needed]", "filled in", 2)
    assert "filled in" in merge(template, model_card(model)).text
    empty = merge(ModelCard("---\nlicense: mit\n---\n"), model_card(model))
    assert empty.data.license == "mit" and "hf-littlebit" in empty.text


def test_dequantized_model_pushes_as_its_class_does(family_dir, hub):
    model = load(family_dir("llama"), quantization_config=LittleBitConfig(bpw=4.0, init="dual_svid"))
    model.dequantize()
    model.push_to_hub("me/dense")
    assert b"automatically generated" in hub.files["README.md"]
