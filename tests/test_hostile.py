"""Folders that someone else wrote: code in pickles, patterns that do not end, text that steers a terminal, pipes, absurd values."""

import io
import json
import logging
import os
import pickle
import shutil
import time

import pytest
import torch
from families import build, config, load
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_littlebit import LittleBitConfig, latent_model, size_report
from hf_littlebit.command.cli import main
from hf_littlebit.command.terminal import guarded, printable, short
from hf_littlebit.module_names import check_steps
from hf_littlebit.report.card import model_card
from hf_littlebit.train.export import SHARDS, latent_checkpoint
from hf_littlebit.train.shards import read_shards


@pytest.fixture(scope="module")
def saved(family_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    load(family_dir("llama"), quantization_config=config()).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(saved, tmp_path):
    """A copy of a packed model's folder, with other values in its config.json."""

    def change(quantization=(), **values):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        data = json.loads((folder / "config.json").read_text()) | values
        data["quantization_config"].update(quantization)
        (folder / "config.json").write_text(json.dumps(data))
        return folder

    return change


def error_of(folder, capfd):
    """The one short line that `info` of a folder, and of its config.json alone, ends with."""
    for name in (folder, folder / "config.json"):
        capfd.readouterr()
        assert main(["info", str(name)]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("littlebit: error: ") and err.count("\n") == 1 and len(err) < 1100
    return err


# -- pickles ------------------------------------------------------------------------------------------------------------------


class Code:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def shards(tmp_path):
    """A latent checkpoint as FSDP2 leaves it with SHARDED_STATE_DICT."""
    model = latent_model(build("llama"), config(), progress=False)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "c")
    state = {"model": {name: value.detach() for name, value in model.state_dict().items()}}
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "c" / SHARDS, no_dist=True)
    return tmp_path / "c", model


def test_shards_are_read_without_running_what_they_name(shards, tmp_path):
    folder, model = shards
    found = latent_checkpoint(str(folder)).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    ran = tmp_path / "ran"
    for code in (
        Code(os.mkdir, str(ran)),
        Code(eval, "1"),
        Code(getattr, pickle.Unpickler, "load"),
        Code(torch.load, "x"),
    ):
        (folder / SHARDS / ".metadata").write_bytes(pickle.dumps(code))
        with pytest.raises(ValueError, match="could run code, so it is not loaded"):
            latent_checkpoint(str(folder))
        assert main(["pack", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_shards_outside_of_their_folder_are_not_read(shards):
    folder, _ = shards
    file = folder / SHARDS / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    place = next(iter(metadata.storage_data.values()))
    place.relative_path = "../../elsewhere"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="is not in the folder"):
        read_shards(str(folder / SHARDS))


# -- pipes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pipe_in_a_files_place_is_refused(sharded, saved, tmp_path, capfd):
    model = load(saved)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if sharded else {}))
    file = sorted(name for name in os.listdir(tmp_path) if name.endswith(".safetensors"))[-1]
    os.remove(tmp_path / file)
    os.mkfifo(tmp_path / file)
    assert "is no regular file" in error_of_folder(tmp_path, capfd)
    with pytest.raises(ValueError if sharded else OSError, match="is no regular file" if sharded else "no file named"):
        load(tmp_path)


def error_of_folder(folder, capfd):
    assert main(["info", str(folder)]) == 2
    return capfd.readouterr().err


def test_a_pipe_as_the_model_or_its_index_is_refused(saved, tmp_path, capfd):
    os.mkfifo(tmp_path / "config.json")
    assert "is no regular file" in error_of_folder(tmp_path / "config.json", capfd)
    assert "holds no config.json" in error_of_folder(tmp_path, capfd)
    shutil.copy(saved / "config.json", tmp_path / "new.json")
    (tmp_path / "new.json").replace(tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert "is no regular file" in error_of_folder(tmp_path, capfd)


def test_a_pipe_in_a_checkpoint_is_refused(shards):
    folder, _ = shards
    os.mkfifo(folder / SHARDS / "__1_0.distcp")
    with pytest.raises(ValueError, match="is no regular file"):
        latent_checkpoint(str(folder))


# -- patterns -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z_0-9])+.?)+[A-Z]$",
        "(a|a)*b",
        "(?:.*.*)*x",
        "a?" * 30 + "b",
        ".*" * 6 + "Z",
        "(a|a)" * 40 + "b",
        r"(\w+)\1\1\1\1\1x",
        "(?P<n>a+)+$",
        "(a*){2,}$",
        r"([\w.]{1,20}){1,20}!",
    ],
)
def test_patterns_that_may_not_end_are_not_run(pattern, changed, capfd):
    begun = time.perf_counter()
    folder = changed({"modules_to_not_convert": [pattern]})
    assert main(["info", str(folder / "config.json")]) == 2
    assert "could take too long to match" in capfd.readouterr().err
    with pytest.raises(ValueError, match="could take too long"):
        latent_model(build("llama"), config(modules_to_not_convert=[pattern]), progress=False)
    # A saved model's files say themselves what was replaced, so its patterns are not needed, and it loads.
    assert load(folder).hf_quantizer.plan.weights
    assert time.perf_counter() - begun < 30


def test_ordinary_patterns_run():
    check_steps(
        "o", ["down_proj", r"model\.layers\.(0|1|2|31)\.mlp\..*", r".*layers\.\d+\.self_attn\.[qk]_proj$", "(?!lm).*a?"]
    )
    check_steps("o", [r"model\.layers\.\d+"] * 30 + [r"(?:ab)+(?:\.\d)*", r"[)|(*+]+", r"\(\w+\|\)"])
    with pytest.raises(ValueError, match="or there are too many"):
        check_steps("o", [r".*\w+.*\d+x"] * 3)


# -- text ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "X; __import__('os').system('id')  #",
        "X\n```\n<script>alert(1)</script>",
        "\x1b[31mX\x07",
        "| a | b ---",
        "x" * 10**6,
        "a.b",
    ],
)
def test_a_class_name_that_is_none_is_refused(name, changed, capfd):
    folder = changed(architectures=[name])
    line = error_of(folder, capfd)
    assert "architectures" in line and "\x1b" not in line
    with pytest.raises(ValueError, match="architectures"):
        model_card(folder, "me/x")


def test_a_card_names_only_classes_of_transformers_and_ids_of_the_hub(changed):
    card = str(model_card(changed(architectures=["os"]), "me/x"))
    assert "import AutoTokenizer, AutoModel\n" in card
    for base in ("../x", "..-._", "a/b)[x](javascript:1", "a/b\n---\nlicense: evil", "a--b"):
        assert base not in str(model_card(changed({"base_model": base}), "me/x"))
    assert "[org/name](https://huggingface.co/org/name)" in str(model_card(changed({"base_model": "org/name"})))
    folder = changed()
    (folder / "model.safetensors").rename(folder / 'model.a"); evil("b.safetensors')
    assert 'variant="a\\"); evil(\\"b"' in str(model_card(folder, "me/x"))


def test_control_characters_do_not_reach_the_terminal(changed, capfd):
    steering = "\x1b]0;title\x07\x9b31m\u202e\r\x08"
    # In a note on stdout, in an error on stderr, and in a file's name.
    assert (
        main(
            [
                "info",
                str(
                    changed(
                        {"module_config": {steering: {"bpw": 1.0}}},
                    )
                ),
            ]
        )
        == 0
    )
    assert main(["info", str(changed({"init": steering}))]) == 2
    assert main(["info", steering]) == 2
    out, err = capfd.readouterr()
    assert "\\x1b]0;title\\x07" in out and "\\x1b]0;title" in err
    assert not set(steering) & set(out + err) - set("0;title31m]")
    stream = io.StringIO()
    logger, handler = logging.getLogger("transformers.of_this_test"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    with guarded():
        print("\x1b[2Jtext\ttab\u2028")
        logger.warning("\x1b[2J")
    assert stream.getvalue() == "\\x1b[2J\n" and handler.stream is stream
    assert capfd.readouterr().out == "\\x1b[2Jtext\ttab\\u2028\n"
    assert printable("\r 5%\x1b[A\x1b[2J", progress=True) == "\r 5%\x1b[A\\x1b[2J"


def test_short_lines():
    assert short("a  b\nc") == "a b c"
    assert len(short("x" * 10**6)) < 100 and len(short("word " * 10**5)) < 1010


# -- values -------------------------------------------------------------------------------------------------------------------

HUGE = 10**400


@pytest.mark.parametrize(
    "values, words",
    [
        ({"hidden_size": HUGE}, "'hidden_size' is a number of 401 digits"),
        ({"vocab_size": -HUGE}, "'vocab_size' is a number of 401 digits"),
        ({"num_hidden_layers": HUGE}, "no model is that large"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1,000,000,000"),
        ({"num_labels": 2**31 - 1}, "'num_labels' is 2,147,483,647; no model is that large"),
        ({"vision_config": {"depth": 10**7}}, "'depth' is 10,000,000; no model is that large"),
        ({"hidden_act": "foo"}, "describes no LlamaForCausalLM that can be made (KeyError: 'foo')"),
        ({"hidden_act": "x" * 10**6}, "KeyError"),
        ({"model_type": "y" * 10**6}, "yyy..."),
        ({"q": {"bpw": HUGE}}, "'quantization_config"),
        ({"q": {"modules_to_not_convert": ["z" * 10**6]}}, "of 1,000,000 characters"),
        ({"q": {"module_config": {"[" * 10**6: {"bpw": 1.0}}}}, "1 patterns of up to 1,000,000 characters"),
        ({"q": {"module_config": {f"*a*{i}*": {"bpw": 1.0} for i in range(5_001)}}}, "5,001 patterns"),
        ({"q": {"u" * 10**6: 1}}, "unknown LittleBitConfig option"),
    ],
)
def test_absurd_values_end_in_one_short_line(values, words, changed, capfd):
    values = dict(values)
    line = error_of(changed(values.pop("q", ()), **values), capfd)
    assert words in line or "bpw" in line, line


# -- dtypes and configs -----------------------------------------------------------------------------------------------------


def test_float64_is_refused_before_work(family_dir, saved, monkeypatch, tmp_path):
    def worked(*args, **kwargs):
        raise AssertionError("a weight was factorized")

    monkeypatch.setattr("hf_littlebit.load.conversion.factorize", worked)
    match = "float64, but LittleBit layers compute in"
    with pytest.raises(ValueError, match=match):
        load(family_dir("llama"), quantization_config=config(), dtype=torch.float64)
    with pytest.raises(ValueError, match=match):
        latent_model(build("llama").double(), config(), progress=False)
    with pytest.raises(ValueError, match=match):
        load(saved, dtype=torch.float64)
    build("llama").double().save_pretrained(tmp_path)
    assert main(["quantize", str(tmp_path), "--bpw", "2.5", "--out", str(tmp_path / "out")]) == 2


def test_a_models_config_serves_as_an_argument(saved):
    model = load(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, config=model.config)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert isinstance(again.config.quantization_config, LittleBitConfig)


def test_a_dense_model_made_with_a_packed_models_config(saved, tmp_path):
    LlamaForCausalLM(load(saved).config).save_pretrained(tmp_path)
    for read in (load, size_report):
        with pytest.raises(ValueError, match="a dense model was made with the config of a quantized one"):
            read(tmp_path)


@pytest.mark.subprocess
def test_the_commands_file_runs_as_a_module(saved):
    import subprocess
    import sys

    command = [sys.executable, "-m", "hf_littlebit.command.cli", "info", str(saved)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0 and "bits per weight" in result.stdout
