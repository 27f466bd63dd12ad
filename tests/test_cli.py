"""The command line: every command on real small models, their errors, and the same through optimum-cli."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import ROOT
from transformers import AutoModelForCausalLM

from hf_littlebit import LittleBitConfig, size_report
from hf_littlebit.command import cli
from hf_littlebit.command.cli import main

FAST = ["--bpw", "4", "--init", "dual_svid"]
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 12


@pytest.fixture(scope="module")
def packed(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "packed"
    assert main(["quantize", stories, *FAST, "--out", str(folder)]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT)
    return str(path)


def fails(arguments, capfd):
    """(exit code, the one line on stderr) of a command that fails."""
    capfd.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line and "Loading weights" not in line]
    assert out == "" and len(lines) == 1, err
    assert lines[0].startswith("littlebit: error: ")
    return code, lines[0].removeprefix("littlebit: error: ")


# -- commands -------------------------------------------------------------------------------------------------------------


def test_quantize_saves_all_that_the_model_needs(packed, stories, capfd):
    names = set(os.listdir(packed))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    model = AutoModelForCausalLM.from_pretrained(packed)
    # 4 bits: the ranks of the other layers end at their sizes, and what that leaves goes to keys and values.
    saved = model.config.quantization_config
    assert saved.to_dict() == LittleBitConfig(4.0, "dual_svid", kv_factor=4.0, ranks=saved.ranks).to_dict()
    assert saved.ranks["model.layers.*.mlp.down_proj"] == model.model.layers[0].mlp.down_proj.ranks
    assert main(["quantize", stories, *FAST, "--out", packed, "--overwrite"]) == 0
    out, err = capfd.readouterr()
    assert f"{size_report(packed).bpw:.4g}" in out and out.endswith(f"saved to {packed}\n")
    assert "Loading weights" in err  # transformers' own progress bar


def test_all_options_reach_the_config(stories, tmp_path):
    options = ["--init", "joint_itq", "--residual", "on", "--kv-factor", "2", "--skip", "o_proj", "gate_proj"]
    options += ["--seed", "7", "--steps", "3"]
    options += ["--module", "down_proj:bpw=6,init=dual_svid,residual=off", "--module", "*.1.*:kv_factor=1.5"]
    out = tmp_path / "new" / "model"
    code = main(
        ["quantize", stories, "--bpw", "5", *options, "--format", "latent", "--workers", "2", "--out", str(out)]
    )
    assert code == 0
    saved = LittleBitConfig.from_dict(json.loads((out / "config.json").read_text())["quantization_config"])
    expected = LittleBitConfig(
        bpw=5.0,
        init="joint_itq",
        residual=True,
        kv_factor=2.0,
        modules_to_not_convert=["o_proj", "gate_proj"],
        seed=7,
        steps=3,
        format="latent",
        module_config={"down_proj": {"bpw": 6.0, "init": "dual_svid", "residual": False}, "*.1.*": {"kv_factor": 1.5}},
    )
    assert saved.ranks.pop("model.layers.*.mlp.down_proj") == [64]  # one path, and what the plan found for the others
    expected.ranks = saved.ranks
    assert saved.to_dict() == expected.to_dict()


def test_quantize_an_encoder_without_tokenizer(family_dir, tmp_path, capfd):
    assert main(["quantize", family_dir("bert"), *FAST, "--out", str(tmp_path / "bert")]) == 0
    assert "note: no tokenizer is saved along" in capfd.readouterr().err
    assert size_report(tmp_path / "bert").architecture == "BertForMaskedLM"


def test_info(packed, stories, capfd):
    assert main(["info", packed, "--json"]) == 0
    measured = json.loads(capfd.readouterr().out)
    assert main(["info", stories, *FAST, "--json"]) == 0
    predicted = json.loads(capfd.readouterr().out)
    assert measured["layers"] == predicted["layers"] and measured["measured"] and not predicted["measured"]
    assert measured["file_bytes"] == os.path.getsize(os.path.join(packed, "model.safetensors"))
    assert main(["info", packed, "--layers"]) == 0
    out, err = capfd.readouterr()
    assert "model.layers.4.mlp.up_proj" in out and err == ""


def test_info_of_a_config_alone(tmp_path, capfd):
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config.update(num_attention_heads=32, vocab_size=32000)
    (tmp_path / "meta-config.json").write_text(json.dumps(config))
    assert (
        main(["info", str(tmp_path / "meta-config.json"), "--bpw", "0.1", "--residual", "on", "--kv-factor", "1"]) == 0
    )
    out = capfd.readouterr().out
    assert "0.60 GB" in out and "13.48 GB" in out and "128+128" in out


def test_eval_of_dense_and_packed(packed, stories, text, capfd):
    found = {}
    for model in (stories, packed):
        assert main(["eval", model, "--text", text, "--length", "64", "--max-blocks", "4", "--json"]) == 0
        out, err = capfd.readouterr()
        found[model] = json.loads(out)
        assert found[model]["blocks"] == 4 and found[model]["tokens"] == 4 * 63
        assert "perplexity" in err  # the progress bar
    assert 1 < found[stories]["perplexity"] < found[packed]["perplexity"]
    assert main(["eval", stories, "--text", text, "--length", "64", "--stride", "32"]) == 0
    assert capfd.readouterr().out.startswith("perplexity  ")


def test_generate_greedy_and_sampled(stories, packed, capfd):
    arguments = ["generate", stories, "--prompt", "Once upon a time", "--max-new-tokens", "12"]
    outputs = []
    for more in ([], ["--greedy"], ["--temperature", "1.5", "--seed", "1"], ["--temperature", "1.5", "--seed", "1"]):
        assert main(arguments + more) == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[2] == outputs[3] != outputs[0]
    assert outputs[0].startswith("Once upon a time, there was a little girl named Lily")
    assert main(["generate", packed, "--prompt", "Once", "--max-new-tokens", "3"]) == 0
    assert capfd.readouterr().out.startswith("Once")


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, "arguments are required: COMMAND"),
        (["frobnicate"], 2, "invalid choice: 'frobnicate'"),
        (["quantize", "STORIES", "--out", "OUT"], 2, "required: --bpw"),
        (["quantize", "STORIES", "--bpw", "1"], 2, "required: --out"),
        (["quantize", "STORIES", "--bpw", "much", "--out", "OUT"], 2, "invalid float value: 'much'"),
        (["quantize", "STORIES", "--bpw", "20", "--out", "OUT"], 2, "bpw is 20.0; it must be a number above 0"),
        (["quantize", "STORIES", "--bpw", "1", "--init", "svd", "--out", "OUT"], 2, "init is 'svd'; choose one of"),
        (["quantize", "STORIES", "--bpw", "1", "--out", "PACKED"], 2, "is not empty"),
        (["quantize", "STORIES", "--bpw", "1", "--out", "TEXT"], 2, "is a file"),
        (["quantize", "STORIES", "--bpw", "1", "--out", "STORIES", "--overwrite"], 2, "is the dense model itself"),
        (["quantize", "PACKED", "--bpw", "1", "--out", "OUT"], 2, "is quantized already"),
        (
            ["quantize", "STORIES", "--bpw", "1", "--device", "abacus", "--out", "OUT"],
            2,
            "'abacus', which this machine",
        ),
        (["quantize", "no/such", "--bpw", "1", "--out", "OUT"], 1, "no/such is no folder here"),
        (["info", "STORIES"], 2, "say how many bits per weight to keep"),
        (["info", "STORIES", "--init", "admm"], 2, "--bpw is missing"),
        (
            ["info", "STORIES", "--bpw", "1", "--module", "down_proj"],
            2,
            "--module 'down_proj' is not PATTERN:KEY=VALUE",
        ),
        (["info", "STORIES", "--bpw", "1", "--module", "a:bpw=b"], 2, "bpw is 'b'; it must be a number"),
        (["info", "STORIES", "--bpw", "1", "--module", "a:rank=2"], 2, "unknown option 'rank'"),
        (["info", "PACKED", "--bpw", "1"], 2, "leave the options out"),
        (["info", "nowhere/config.json", "--bpw", "1"], 2, "does not exist"),
        (["info", "TEXT", "--bpw", "1"], 1, "not a valid JSON file"),
        (["eval", "STORIES", "--text", "nothing.txt"], 2, "--text nothing.txt is no file (No such file or directory)"),
        (["eval", "STORIES", "--text", "STORIES/model.safetensors"], 2, "is not UTF-8 text"),
        (["eval", "STORIES", "--text", "TEXT", "--length", "9999"], 2, "length is 9999"),
        (["eval", "STORIES", "--text", "TEXT", "--device", "abacus"], 2, "--device is 'abacus'"),
        (["eval", "BERT", "--text", "TEXT"], 2, "has no tokenizer"),
        (["generate", "STORIES", "--prompt", "a", "--temperature", "0"], 2, "--temperature is 0"),
        (["generate", "STORIES", "--prompt", "a", "--temperature", "1", "--greedy"], 2, "not allowed with"),
        (["generate", "STORIES", "--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens is 0"),
        (["generate", "STORIES", "--prompt", "a", "--max-new-tokens", "600"], 2, "exceed the model's context of 512"),
        (["push", "STORIES", "me/model"], 2, "holds a dense model"),
        (["push", "nowhere", "me/model"], 2, "is not a folder"),
    ],
)
def test_one_line_errors(arguments, code, words, stories, packed, text, family_dir, tmp_path, capfd):
    names = {
        "STORIES": stories,
        "PACKED": packed,
        "TEXT": text,
        "OUT": str(tmp_path / "out"),
        "BERT": family_dir("bert"),
    }
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    found, line = fails(arguments, capfd)
    assert found == code and words in line
    assert not (tmp_path / "out").exists()


ODD = {
    "list": ({"quantization_config": ["littlebit"]}, "quantization_config is ['littlebit']"),
    "text": ({"quantization_config": "littlebit"}, "quantization_config is 'littlebit'"),
    "architecture": ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
    "number": ({"architectures": 5}, "architectures is 5"),
    "type": ({"model_type": "nope"}, "model type `nope`"),
    "no type": ({"model_type": ...}, "`model_type`"),
    "size": ({"hidden_size": "wide"}, "describes no model"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_config_ends_in_one_line(name, stories, text, tmp_path, capfd):
    changes, words = ODD[name]
    folder = shutil.copytree(stories, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    for command in (
        ["info", folder],
        ["info", folder / "config.json", "--bpw", "4"],
        ["eval", folder, "--text", text],
        ["generate", folder, "--prompt", "a"],
        ["quantize", folder, *FAST, "--out", tmp_path / "out" / "deep"],
        ["push", folder, "me/model"],
    ):
        code, line = fails(command, capfd)
        assert code == 2 and words in line, command
    assert not (tmp_path / "out").exists()


def test_null_quantization_is_a_dense_model(stories, text, tmp_path, capfd):
    folder = shutil.copytree(stories, tmp_path / "null")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": None, "architectures": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["quantize", str(folder), *FAST, "--out", str(tmp_path / "out")]) == 0
    assert main(["info", str(folder), *FAST]) == 0
    assert main(["eval", str(folder), "--text", text, "--length", "64", "--max-blocks", "1"]) == 0


def test_failure_leaves_no_empty_folders(stories, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    for out in ("a/b/c", "old/b/c", tmp_path / "absolute" / "c"):
        # Refused by the initialiser's own check, after the folder was made.
        code, line = fails(["quantize", stories, *FAST, "--device", "abacus", "--out", out], capfd)
        assert code == 2 and "abacus" in line
    assert os.listdir(tmp_path) == ["old"] and not os.listdir(tmp_path / "old")

    def broken(model, folder):
        (Path(folder) / "half").write_text("")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", broken)
    assert main(["quantize", stories, *FAST, "--out", "old/b/c"]) == 1
    assert capfd.readouterr().err.endswith("littlebit: error: old/b/c: No space left on device\n")
    assert os.listdir(tmp_path) == ["old"] and not os.listdir(tmp_path / "old")  # nor half of a model
    (tmp_path / "file").write_text("")
    code, line = fails(["quantize", stories, *FAST, "--out", "file/sub"], capfd)
    assert code == 1 and "file/sub: Not a directory" in line


def test_variant_of_a_packed_model(packed, text, tmp_path, capfd):
    AutoModelForCausalLM.from_pretrained(packed).save_pretrained(tmp_path, variant="v2")
    shutil.copy(os.path.join(packed, "tokenizer.json"), tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    capfd.readouterr()
    found = []
    for model in (packed, tmp_path):
        assert main(["eval", str(model), "--text", text, "--length", "64", "--max-blocks", "2", "--json"]) == 0
        found.append(json.loads(capfd.readouterr().out))
    assert found[0] == found[1]


def test_damaged_file_is_named(packed, tmp_path, text, capfd):
    for name in os.listdir(packed):
        (tmp_path / name).write_bytes(Path(packed, name).read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (["info", tmp_path], ["eval", tmp_path, "--text", text], ["push", tmp_path, "me/model"]):
        code, line = fails(command, capfd)
        assert code == 2 and "model.safetensors is damaged" in line


def test_debug_shows_the_traceback(stories):
    for arguments in (["--debug", "info", stories], ["info", stories, "--debug"]):
        with pytest.raises(ValueError, match="say how many bits"):
            main(arguments)


def test_interrupt_and_unforeseen_errors(monkeypatch, stories, capfd):
    def interrupted(args):
        raise KeyboardInterrupt

    def broken(args):
        raise KeyError("what")

    monkeypatch.setattr(cli, "run_info", interrupted)
    assert main(["info", stories]) == 130
    monkeypatch.setattr(cli, "run_info", broken)
    code, line = fails(["info", stories], capfd)
    assert code == 1 and line == "KeyError: 'what' (--debug shows where)"


@pytest.mark.subprocess
def test_reader_that_leaves(stories):
    read, write = os.pipe()
    os.close(read)
    script = "import sys; from hf_littlebit.command.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "info", stories, "--bpw", "4"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert result.returncode == 141 and result.stderr == ""


# -- optimum --------------------------------------------------------------------------------------------------


def test_optimum_cli(monkeypatch, stories, capfd):
    monkeypatch.syspath_prepend(str(ROOT / "src"))  # as an installed wheel has it
    optimum_cli = pytest.importorskip("optimum.commands.optimum_cli")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
        with pytest.raises(SystemExit) as exit:
            optimum_cli.main()
        return exit.value.code, *capfd.readouterr()

    assert run("littlebit", "info", stories, *FAST)[:2] == (
        0,
        size_report(stories, LittleBitConfig(4.0, "dual_svid")).table() + "\n",
    )
    code, out, _ = run("littlebit", "--help")
    assert code == 0 and out.startswith("usage: optimum-cli littlebit") and "quantize" in out
    code, out, _ = run("littlebit", "quantize", "--help")
    assert code == 0 and "--kv-factor" in out
    code, _, err = run("littlebit", "info", stories, "--bpw", "99")
    assert code == 2 and err.startswith("littlebit: error: bpw is 99.0")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.subprocess
def test_a_program_keeps_freed_memory_and_a_library_does_not():
    """Pages that a process touches first: every tensor's where memory goes back to the system."""
    code = (
        "import sys, resource, torch\n"
        "from hf_littlebit.command import cli\n"
        "cli._run = lambda args: 0\n"
        "words = ['train', 'model', '--bpw', '1', '--data', 'self', '--out', 'out']\n"
        "sys.argv = ['littlebit', *words]\n"
        "cli.main(None if KEPT else words)\n"
        "torch.empty(10_000_000).fill_(1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20):\n"
        "    torch.empty(10_000_000).fill_(1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    commands = [[sys.executable, "-c", f"KEPT = {kept}\n{code}"] for kept in (True, False)]
    faults = [int(subprocess.run(each, capture_output=True, check=True).stdout) for each in commands]
    assert faults[0] < 0.5 * faults[1]
