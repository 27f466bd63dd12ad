"""`littlebit quantize --data`: from a dense model and a text to a refined one, its refusals, and going on after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from families import build, load
from transformers import AutoTokenizer

from hf_littlebit import perplexity
from hf_littlebit.command.cli import main
from hf_littlebit.command.refine_command import BLOCK_TOKENS
from hf_littlebit.load.replacement import replacement
from hf_littlebit.refinement import distillation
from hf_littlebit.refinement.journal import foreign_names
from hf_littlebit.refinement.recipe import Recipe, block_rows
from hf_littlebit.report.size import size_report

MAIN = "import sys; from hf_littlebit.command.cli import main; sys.exit(main(sys.argv[1:]))"
METHOD = ["--bpw", "2", "--init", "admm", "--steps", "10"]
SHORT = ["--length", "32", "--tokens", "1280", "--distill-epochs", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "story.txt"
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    file.write_text(story * 100)
    return str(file)


def words(model, text, out, *more):
    return ["quantize", model, *METHOD, "--data", text, "--out", str(out), *SHORT, *more]


def test_from_text_to_refined(stories, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(stories, text, out)) == 0
    printed = capsys.readouterr()
    assert f"saved to {out}" in printed.out and "refining" in printed.err
    assert re.search(r"about \d+ minutes for the other blocks and \d+ for the distillation", printed.err)
    assert "of the end of the text, which was held out" in printed.out
    assert sorted(os.listdir(out)) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert main(["quantize", stories, *METHOD, "--out", str(tmp_path / "plain")]) == 0
    assert size_report(str(out)).total_bytes == size_report(str(tmp_path / "plain")).total_bytes
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with open(text, encoding="utf-8") as file:
        written = file.read()
    refined, plain = (
        perplexity(load(str(folder)), tokenizer, written, length=64, max_blocks=4, progress=False).loss
        for folder in (out, tmp_path / "plain")
    )
    assert refined < plain - 0.1


def test_text_of_its_own_and_no_distillation(stories, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(stories, "self", out, "--distill-epochs", "0", "--epochs", "0.2", "--tokens", "320")) == 0
    assert load(str(out)).config.quantization_config.bpw == 2.0
    assert re.search(r"note: .* [\d.]+ kB; with --embedding-bits 4 --head-bits 4 it would ", capsys.readouterr().err)


def test_a_file_is_as_small_as_its_note_said(stories, tmp_path, capsys, caplog):
    """The head's 4 bits are rounded for the text, with nothing to be said."""
    out, small = tmp_path / "out", ["--embedding-bits", "4", "--head-bits", "4"]
    short = ["--distill-epochs", "0.2", "--epochs", "0.2", "--tokens", "320"]
    assert main(words(stories, "self", out, *short)) == 0
    said = re.search(r"it would have ([\d.]+) kB", capsys.readouterr().err)
    assert main(words(stories, "self", out, *short, *small, "--overwrite")) == 0
    assert "note: the file" not in capsys.readouterr().err and "its weights alone" not in caplog.text
    assert size_report(str(out)).total_bytes == pytest.approx(1e3 * float(said[1]), rel=0.03)  # bits are shared out


@pytest.fixture
def seen(monkeypatch):
    """The tokens of every text that would have been refined on, and the recipe, in a command that then ends with 2."""
    found = []

    def refined(model, config, blocks, recipe, **options):
        found.append(SimpleNamespace(tokens=blocks.tokens, recipe=recipe))
        raise ValueError("this is all")

    monkeypatch.setattr("hf_littlebit.refinement.refinement.refine", refined)
    return found


def test_text_that_is_given_and_written(seen, stories, text, tmp_path, monkeypatch):
    with open(text, encoding="utf-8") as file:
        (part := tmp_path / "part.txt").write_text(file.read()[:2500])
    short = ["--length", "32", "--tokens", "1280"]
    for data in ([text], [text, "self"], [str(part)], [str(part), "--no-own-text"]):
        words = ["quantize", stories, *METHOD, *short, "--out", str(tmp_path / "out"), "--overwrite", "--data", *data]
        assert main(words) == 2
    alone, mixed, filled, unfilled = (each.tokens for each in seen)
    assert len(alone) == 36 and len(mixed) == 36  # 40 blocks, 4 held out; 20 and 2 of the text, and as many are written
    assert 20 < len(unfilled) < 30 and len(filled) == 40 - 2  # no more than --tokens, and 2 are held out
    assert {tuple(row) for row in unfilled.tolist()} < {tuple(row) for row in filled.tolist()}
    # No more is written than the recipe uses.
    monkeypatch.setattr("hf_littlebit.command.refine_command.TOKENS", 30 * 32)
    assert main(words[:-1]) == 2
    assert len(seen.pop().tokens) == 30 - 2
    text_rows = {tuple(row) for row in alone.tolist()}
    given = torch.tensor([tuple(row) in text_rows for row in mixed.tolist()])
    assert given.sum() == 18
    rows = block_rows(mixed, Recipe(block_tokens=18 * 32, length=16))  # half of the rows, as pieces of 16
    chosen = torch.tensor([any(tuple(row.tolist()) == whole[:16] for whole in text_rows) for row in rows[::2]])
    for part in (chosen, chosen[:8], given[:8], given[-8:]):
        assert 0 < part.sum() < len(part)


def test_so_much_is_written_as_is_asked(seen, stories, text, tmp_path, capsys):
    command = [
        "quantize",
        stories,
        *METHOD,
        "--length",
        "32",
        "--tokens",
        "640",
        "--out",
        str(tmp_path / "out"),
        "--overwrite",
    ]
    for names in ([text], [text, "self"]):
        assert main([*command, "--data", *names, "--own-tokens", "1000", "--distill-epochs", "2"]) == 2
    assert [len(each.tokens) for each in seen] == [18 + 31, 18 + 31]  # 20 blocks of the text, 2 held out
    assert (
        seen[0].recipe.distillation.epochs == 2
        and seen[0].recipe.block_tokens == Recipe().block_tokens == BLOCK_TOKENS == 65_536
    )
    assert main([*command, "--data", text, "--block-tokens", "640"]) == 2
    assert seen.pop().recipe.block_tokens == 640
    assert main([*command, "--data", text, "--own-tokens", "1000"]) == 2 and len(seen) == 2
    assert "say by --distill-epochs how many times" in capsys.readouterr().err


def test_so_little_text_moves_no_embedding(seen, stories, tmp_path):
    command = ["quantize", stories, "--bpw", "2", "--out", str(tmp_path / "out")]
    assert main(command) == main([*command, "--overwrite", "--data", "self", "--distill-epochs", "1"]) == 2
    assert [each.recipe.distillation.embeddings for each in seen] == [False, True]


def test_what_writes_slowly_writes_only_if_asked(seen, stories, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_littlebit.command.text.CACHE", 1e6)  # some rows of so small a model
    command = ["quantize", stories, *METHOD, "--length", "512", "--tokens", "40960", "--data", text, "--no-check"]
    for more in ([], ["--own-text"]):
        assert main([*command, "--out", str(tmp_path / "out"), "--overwrite", *more]) == 2
    printed = capsys.readouterr().err
    assert printed.count("note: the text has ") == 1 and "with --own-text" in printed
    assert len(seen[1].tokens) == 2 * len(seen[0].tokens)


@pytest.mark.parametrize("more", [[], ["--no-allocate"]])
def test_bits_are_shared_out_unless_that_is_left_out(more, stories, text, tmp_path):
    out = tmp_path / "out"
    command = [
        "quantize",
        stories,
        "--bpw",
        "1",
        "--steps",
        "10",
        "--data",
        text,
        "--out",
        str(out),
        "--no-check",
        *more,
    ]
    assert main([*command, "--length", "32", "--tokens", "320", "--epochs", "0.2", "--distill-epochs", "0"]) == 0
    assert bool(load(str(out)).config.quantization_config.module_config) == (not more)
    assert 0.97 < size_report(str(out)).bpw <= 1.01


@pytest.mark.parametrize(
    "more, message",
    [
        (["--epochs", "-1"], "--epochs is -1; it must be 0 or more"),
        (["--epochs", "0"], "give --weights-only"),
        (["--tokens", "40"], "at least 4 blocks of 32"),
        (["--tokens", "224", "--data", "self", "other.txt"], "at least 8 blocks of 32"),
        (["--length", "4096"], "the model's context of 512"),
        (["--format", "latent"], "use littlebit train"),
        (["--data", "self", "other.txt", "self"], "names self twice"),
        (["--no-own-text", "--data", "self", "other.txt"], "forbids the model to write"),
        (["--block-tokens", "0"], "--block-tokens is 0; it must be 1 or more"),
        (["--own-tokens", "31", "--distill-epochs", "1"], "--own-tokens is 31; a block of text has 32"),
        (["--own-tokens", "320", "--no-own-text"], "forbids it to write"),
        (["--own-tokens", "320", "--data", "self"], "names no other text"),
        (["--data", "missing.txt"], "missing.txt does not exist"),
        (["--resume"], "no unfinished refinement"),
        (["--weights-only"], "leave one out"),
        (["--workers", "7"], "--workers is 7, for weights that are factorized as they are read"),
    ],
)
def test_what_cannot_work_is_refused(more, message, stories, text, tmp_path, capsys):
    more = [text if word == "other.txt" else word for word in more]
    assert main(words(stories, text, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out" / "config.json")


def test_a_folder_of_the_user_s_stays(stories, text, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "refinement").mkdir(parents=True)
    (out / "refinement" / "notes.txt").write_text("mine")
    assert main(words(stories, text, out, "--overwrite")) == 2
    assert "notes.txt in it that is none" in capsys.readouterr().err
    alone = ["quantize", stories, *METHOD, "--weights-only", "--no-check", "--out", str(out), "--overwrite"]
    assert main(alone) == 0
    assert (out / "refinement" / "notes.txt").read_text() == "mine" and (out / "config.json").exists()


def test_begun_work_is_kept_until_what_replaces_it_can_be_done(stories, text, tmp_path):
    options = tmp_path / "out" / "refinement" / "options.json"
    options.parent.mkdir(parents=True)
    options.write_text("{}")
    for more in (["--length", "4096"], ["--tokens", "40"]):
        assert main(words(stories, text, tmp_path / "out", "--overwrite", *more)) == 2
        assert options.exists()


def test_what_a_kill_left_of_the_teacher_is_no_file_of_the_user_s(tmp_path):
    for name in ("teacher", "teacher.parts", ".teacher.saving", "options.json.part"):
        (tmp_path / name).mkdir()
    assert foreign_names(str(tmp_path)) == []
    (tmp_path / "teacher.txt").touch()
    assert foreign_names(str(tmp_path)) == ["teacher.txt"]


def test_work_under_way_is_not_discarded_by_another(stories, text, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "refinement").mkdir(parents=True)
    (out / "refinement" / "options.json").write_text("{}")
    with replacement(out):
        assert main(words(stories, text, out, "--overwrite")) == 2
    assert "another process is saving" in capsys.readouterr().err
    assert (out / "refinement" / "options.json").exists()


def test_the_text_is_the_same_whatever_is_checked_and_free(seen, stories, text, tmp_path, monkeypatch):
    """So that work goes on where less memory is free, and where nothing is to be compared."""
    begun = words(stories, text, tmp_path / "out", "--own-text")
    assert main(begun) == 2
    (tmp_path / "out" / "refinement" / "options.json").write_text("{}")
    monkeypatch.setattr(distillation, "free_memory", lambda device: 1.0)
    for more in ([], ["--no-check"]):
        assert main([*begun, "--resume", *more]) == 2
    assert torch.equal(seen[0].tokens, seen[1].tokens) and torch.equal(seen[0].tokens, seen[2].tokens)


def test_tokens_that_the_model_has_not_are_refused(text, tmp_path, capsys, stories):
    folder = str(tmp_path / "model")
    build("llama").save_pretrained(folder)  # 128 embeddings
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    assert main(words(folder, text, tmp_path / "out")) == 2
    assert "but the model has 128; use the model's own tokenizer" in capsys.readouterr().err


def test_options_without_text_are_refused(stories, tmp_path, capsys):
    assert main(["quantize", stories, *METHOD, "--out", str(tmp_path / "out"), "--epochs", "2"]) == 2
    assert "--epochs is for refinement on text; add --data" in capsys.readouterr().err


@pytest.mark.subprocess
def test_a_kill_loses_one_block_at_most(stories, text, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = ["--epochs", "4"]
    command = [sys.executable, "-c", MAIN]
    subprocess.run([*command, *words(stories, text, whole, *more)], check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        [*command, *words(stories, text, killed, *more)], env=environment, stderr=subprocess.DEVNULL
    )
    done = killed / "refinement" / "done.json"
    until = time.monotonic() + 300
    while not (done.exists() and len(json.loads(done.read_text())) >= 2):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    blocks = len(json.loads(done.read_text()))
    assert 2 <= blocks < 5
    assert main(words(stories, text, killed, *more)) == 2
    assert "add --resume to go on" in capsys.readouterr().err
    assert main(words(stories, text, killed, *more, "--resume", "--seed", "1")) == 2
    assert "was started with" in capsys.readouterr().err
    again = subprocess.run(
        [*command, *words(stories, text, killed, *more, "--resume")], check=True, env=environment, capture_output=True
    )
    assert f"{blocks}/5" in again.stderr.decode()  # where the bar goes on
    first, second = load(str(whole)).state_dict(), load(str(killed)).state_dict()
    for name, value in first.items():
        assert torch.equal(second[name], value), name
