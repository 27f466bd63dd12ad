"""Model cards, and pushes against stubs of the Hub's client and of the Hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from conftest import load
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from hf_littlebit import LittleBitConfig, card, size_report
from hf_littlebit.card import merge, model_card, push_folder

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
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A StubApi in place of the Hub; `hub.card` is the card that the repository has."""
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
    monkeypatch.setattr(card, "HfApi", lambda token=None: stub)
    return stub


@pytest.fixture(scope="module")
def model(family_dir):
    config = LittleBitConfig(bpw=4.0, init="dual_svid", base_model="org/small-llama")
    return load(family_dir("llama"), quantization_config=config)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def test_metadata_and_figures(model):
    report = size_report(model)
    written = model_card(model, "me/small", {"WikiText-2 perplexity": 12.3456})
    data = written.data.to_dict()
    assert data["base_model"] == "org/small-llama" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"littlebit", "sub-1-bit", "quantized"} <= set(data["tags"])
    for words in (
        f"| bits per weight asked       | {report.bpw_asked:g} ",
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


def test_push_folder(folder, hub):
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "trainer_state.json", ".secret.json", "old.safetensors", "training_args.bin"):
        (folder / name).write_text("not for upload")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.json").write_text("{}")
    assert push_folder(str(folder), "me/small", private=True).commit_url
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert set(hub.files) == expected | {"tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"base_model: org/small-llama" in hub.files["README.md"]
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_text("# Mine")
    push_folder(str(folder), "me/small")
    assert b"# Mine" in hub.files["README.md"] and b"- littlebit" in hub.files["README.md"]


def test_push_folder_refuses(folder, hub, family_dir, tmp_path):
    with pytest.raises(ValueError, match="holds a dense model"):
        push_folder(family_dir("llama"), "me/small")
    with pytest.raises(ValueError, match="is not a folder"):
        push_folder(str(tmp_path / "none"), "me/small")
    with pytest.raises(ValueError, match="a/b/c"):
        push_folder(str(folder), "a/b/c")
    latent = LittleBitConfig(bpw=4.0, init="dual_svid", format="latent")
    load(family_dir("llama"), quantization_config=latent).save_pretrained(tmp_path / "latent")
    with pytest.raises(ValueError, match="holds a latent model"):
        push_folder(str(tmp_path / "latent"), "me/small")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        push_folder(str(folder), "me/small")
    assert hub.created is None and not hub.files


# -- the same over HTTP, from the command line --------------------------------------------------------------------------


class HubStub(BaseHTTPRequestHandler):
    """What uploads and header reads need of the Hub's protocol; `server.files` is the repository."""

    def log_message(self, *unused):
        pass

    def answer(self, content, code=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        name = self.path.partition("/resolve/main/")[2]
        if name not in self.server.files:
            return self.answer({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = self.server.files[name]
        headers = {"ETag": f'"{hash(content)}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        self.server.read.append((self.command, name, self.headers.get("Range")))
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            first, last = asked.removeprefix("bytes=").split("-")
            total, content = len(content), content[int(first) : int(last or len(content)) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{total}"
            return self.answer(content, 206, headers)
        return self.answer(content, 200, headers)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"{self.server.url}/me/tiny"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{self.server.url}/me/tiny/commit/1", "commitOid": "1" * 40})
        if self.path.endswith("/paths-info/main"):
            sizes = {name: len(content) for name, content in self.server.files.items()}
            return self.answer(
                [{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in sizes.items() if n in str(body)]
            )
        return self.answer({}, 200)


def test_push_and_info_through_the_protocol(folder, tmp_path):
    packed = str(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStub)
    server.files, server.read, server.created = {}, [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_x",
    }
    environment["HF_HUB_DISABLE_XET"] = "1"
    script = f"""
import sys
from hf_littlebit.cli import main
codes = main(["push", {packed!r}, "me/tiny", "--private"]), main(["info", "me/tiny"])
sys.exit(codes != (0, 0))
"""
    command = [sys.executable, "-c", script]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    pushed, _, shown = result.stdout.partition("\n")
    assert pushed == f"{server.url}/me/tiny/commit/1" and "private" in str(server.created)
    assert set(server.files) == {*os.listdir(packed), "README.md"}
    assert server.files["model.safetensors"] == Path(packed, "model.safetensors").read_bytes()
    assert b'from_pretrained("me/tiny")' in server.files["README.md"]
    assert shown == size_report(packed).table() + "\n"
    # Of the weights, ranges at the start were read, where the header is.
    reads = [asked for command, name, asked in server.read if name == "model.safetensors" and command == "GET"]
    assert reads and all(asked and asked.startswith("bytes=0-") for asked in reads)
