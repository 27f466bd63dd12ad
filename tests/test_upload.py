"""Pushes of a folder: what goes to the Hub and what stays, against a stub of its client and over HTTP."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import transformers
from families import load
from test_card import stub_hub

from hf_littlebit import LittleBitConfig, size_report
from hf_littlebit.report import upload
from hf_littlebit.report.upload import push_folder

SAVED = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    stub = stub_hub(monkeypatch, tmp_path)
    monkeypatch.setattr(upload, "HfApi", lambda token=None: stub)
    return stub


@pytest.fixture(scope="module")
def model(family_dir):
    config = LittleBitConfig(bpw=4.0, init="dual_svid", base_model="org/small-llama")
    return load(family_dir("llama"), quantization_config=config)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def test_push_folder(folder, hub, caplog):
    names = {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"}
    names |= {"chat_template.jinja", "special_tokens_map.json", "preprocessor_config.json", "LICENSE", "NOTICE.txt"}
    names |= {"LICENSE-MODEL.md", "additional_chat_templates/tools.jinja"}
    staying = {"optimizer.pt", "trainer_state.json", "old.safetensors", "training_args.bin", "notes.txt", "wandb.json"}
    staying |= {"credentials.json", "LICENSE_KEYS.json", "requirements.txt", "model.safetensors.index.json"}
    staying |= {"sub/more.json", "sub/tokenizer.json", "additional_chat_templates/notes.txt", ".secret.json"}
    for name in names | staying:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert push_folder(str(folder), "me/small", private=True).commit_url
    assert set(hub.files) == SAVED | names
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"base_model: org/small-llama" in hub.files["README.md"]
    (message,) = caplog.messages
    assert message.startswith("not uploaded, since it is no file of a saved model: ")
    told = set(message.partition(": ")[2].split(", "))
    assert told == {name for name in staying if name[0] not in ".s"} | {"sub/"}
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_text("# Mine")
    push_folder(str(folder), "me/small")
    assert b"# Mine" in hub.files["README.md"] and b"- littlebit" in hub.files["README.md"]


def test_a_folder_with_packed_tables_is_pushed_with_its_figures(family_dir, hub, tmp_path):
    config = LittleBitConfig(bpw=4.0, init="dual_svid", embedding_bits=8, head_bits=8)
    load(family_dir("llama_tied"), quantization_config=config).save_pretrained(tmp_path / "packed")
    push_folder(str(tmp_path / "packed"), "me/small")
    assert set(hub.files) == SAVED
    report, card = size_report(str(tmp_path / "packed")), hub.files["README.md"].decode()
    assert f"{report.whole_bpw:.4g}" in card and "`model.embed_tokens` and `lm_head`: 8 bits" in card
    weights = tmp_path / "packed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    hub.files.clear()
    with pytest.raises(ValueError, match="damaged"):
        push_folder(str(tmp_path / "packed"), "me/small")
    assert not hub.files


def test_many_files_that_stay_are_counted(folder, hub, caplog):
    for number in range(20):
        (folder / f"log-{number:02}.txt").write_text("")
    push_folder(str(folder), "me/small")
    assert set(hub.files) == SAVED and caplog.messages[0].endswith("log-11.txt and 8 more")


def test_sharded_and_variant_folders_take_their_index_along(model, hub, tmp_path, caplog):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB", variant="v2")
    push_folder(str(tmp_path / "sharded"), "me/small")
    assert set(hub.files) == {*os.listdir(tmp_path / "sharded"), "README.md"} and not caplog.messages
    assert "model.safetensors.index.v2.json" in hub.files
    assert b'from_pretrained("me/small", variant="v2")' in hub.files["README.md"]


def test_weights_of_the_model_before_go(model, folder, hub, tmp_path):
    """transformers would read them first, and the config is another one's; other variants and files stay."""
    push_folder(str(folder), "me/small")
    hub.files |= {"model.v2.safetensors": b"other", "notes.md": b"mine", "adapter_model.safetensors": b"adapters"}
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    push_folder(str(tmp_path / "sharded"), "me/small")
    kept = {"model.v2.safetensors", "notes.md", "adapter_model.safetensors", "README.md"}
    assert set(hub.files) == {*os.listdir(tmp_path / "sharded"), *kept}
    push_folder(str(folder), "me/small")
    assert set(hub.files) == SAVED | kept


def test_what_only_begins_like_a_licence_stays(folder, hub):
    legal = {"LICENSE-2.0.txt", "License.txt", "NOTICE", "COPYING", "USE_POLICY.md", "LICENSE_LLAMA"}
    other = {"license_key.txt", "LICENSE-secret", "NOTICE_internal.md", "licence_server_token"}
    for name in legal | other:
        (folder / name).write_text("")
    push_folder(str(folder), "me/small")
    assert set(hub.files) == SAVED | legal


def test_links_out_of_the_folder_are_not_followed(folder, hub, tmp_path, caplog):
    (tmp_path / "secret").write_text("s3cret")
    (folder / "mine.json").write_text("{}")
    for name in ("tokenizer.json", "LICENSE", "README.md", "vocab.txt"):
        (folder / name).symlink_to(tmp_path / "secret")
    (folder / "merges.txt").symlink_to(tmp_path / "nothing")
    (folder / "vocab.json").symlink_to("mine.json")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("s3cret")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    push_folder(str(folder), "me/small")
    assert set(hub.files) == SAVED | {"vocab.json"}
    assert not any(b"s3cret" in content for content in hub.files.values())
    assert b"hf-littlebit" in hub.files["README.md"] and (tmp_path / "secret").read_text() == "s3cret"
    stay = ["LICENSE", "README.md", "merges.txt", "tokenizer.json", "vocab.txt", "additional_chat_templates/x.jinja"]
    assert "not uploaded, since it links out of the folder: " + ", ".join(stay) in caplog.messages
    hub.files.clear()
    hub.created = None
    for name in ("model.safetensors", "config.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} links to a file outside of its folder; put the file itself"):
            push_folder(str(folder), "me/small")
        assert hub.created is None and not hub.files
        (folder / name).unlink()
        shutil.move(tmp_path / name, folder / name)


def test_snapshot_in_the_cache_is_pushed(folder, hub, tmp_path, caplog):
    """Every file of a snapshot is a link to a blob of its repository; a link to anything else is none of it."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("# Theirs")
    for name in os.listdir(folder):
        shutil.copy(folder / name, repository / "blobs" / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    (tmp_path / "hub" / "blobs").mkdir()
    for name, target in (("LICENSE", tmp_path / "hub" / "blobs" / "x"), ("NOTICE", repository / "refs")):
        target.write_text("elsewhere")
        (snapshot / name).symlink_to(target)
    linked = tmp_path / "by-another-name"
    linked.symlink_to(snapshot)
    for path in (snapshot, linked):
        hub.files.clear()
        caplog.clear()
        push_folder(str(path), "me/small")
        assert set(hub.files) == SAVED | {"tokenizer.json"}
        assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert b"# Theirs" in hub.files["README.md"]
        assert caplog.messages[-1] == "not uploaded, since it links out of the folder: LICENSE, NOTICE"
        assert not any("no file of a saved model" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "kind",
    ["LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer", "XLMRobertaTokenizer", "DebertaV2Tokenizer"],
)
def test_names_of_vocabularies_are_known(kind):
    names = set(getattr(transformers, kind).vocab_files_names.values())
    assert names and names <= upload.VOCABULARIES | upload.CONFIGS


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
        if "/tree/main" in self.path:
            return self.answer(
                [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.server.files.items()]
            )
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
                if line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            return self.answer({"commitUrl": f"{self.server.url}/me/tiny/commit/1", "commitOid": "1" * 40})
        if self.path.endswith("/paths-info/main"):
            sizes = {name: len(content) for name, content in self.server.files.items()}
            return self.answer(
                [{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in sizes.items() if n in str(body)]
            )
        return self.answer({}, 200)


@pytest.mark.subprocess
def test_push_and_info_through_the_protocol(folder, tmp_path):
    packed = str(folder)
    (folder / "notes.txt").write_text("mine")
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStub)
    server.files, server.read, server.created = {"model-00001-of-00002.safetensors": b"of the model before"}, [], None
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
from hf_littlebit.command.cli import main
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
    assert set(server.files) == {*os.listdir(packed), "README.md"} - {"notes.txt"}
    assert "not uploaded, since it is no file of a saved model: notes.txt" in result.stderr.splitlines()
    assert server.files["model.safetensors"] == Path(packed, "model.safetensors").read_bytes()
    assert b'from_pretrained("me/tiny")' in server.files["README.md"]
    assert "model-00001-of-00002.safetensors" not in server.files
    assert shown == size_report(packed).table() + "\n"
    # Of the weights, ranges at the start were read, where the header is.
    reads = [asked for command, name, asked in server.read if name == "model.safetensors" and command == "GET"]
    assert reads and all(asked and asked.startswith("bytes=0-") for asked in reads)
