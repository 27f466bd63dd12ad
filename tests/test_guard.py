"""What is said of a model that was just quantized: on the command line, and in its card."""

import math
import shutil

import pytest
import torch
from families import build, load
from huggingface_hub import ModelCard
from test_card import stub_hub

from hf_littlebit.command import text_free
from hf_littlebit.command.cli import main
from hf_littlebit.refinement.blocks import BlockList, NoChain
from hf_littlebit.refinement.journal import Journal
from hf_littlebit.report import upload
from hf_littlebit.report.card import evaluation_of, model_card, write_card
from hf_littlebit.report.evaluate import perplexity
from hf_littlebit.report.guard import MARGIN, OWN_MARGIN, UNUSABLE, Check, block_loss
from hf_littlebit.report.upload import push_folder


def check(dense, packed, vocabulary=1000):
    return Check(dense, packed, 2040, vocabulary)


def test_text_that_the_model_wrote_flatters():
    near, far = 3.0 + OWN_MARGIN - 0.01, 3.0 + OWN_MARGIN + 0.01
    assert Check(3.0, near, 2040, 1000, own=True).usable
    assert not Check(3.0, far, 2040, 1000, own=True).usable and check(3.0, far).usable
    assert (
        "the dense model wrote" in Check(3.0, near, 2040, 1000, own=True).line()
        and "held out" in check(3.0, far).line()
    )


@pytest.mark.parametrize(
    ("dense", "packed", "usable"),
    [
        (3.0, 3.2, True),
        (3.0, 3.0 + MARGIN - 0.01, True),
        (3.0, 3.0 + MARGIN + 0.01, False),
        (6.5, math.log(1000) + 0.01, False),
        (3.0, math.nan, False),
        (3.0, math.inf, False),
        (3.0, 800.0, False),
    ],
)
def test_the_line(dense, packed, usable):
    line = check(dense, packed).line()
    assert check(dense, packed).usable == usable and (UNUSABLE in line) != usable and "\n" not in line
    assert f"perplexity {math.exp(dense):.4g} dense" in line and "2,040 tokens" in line
    assert ("worse than a uniform guess (1,000)" in line) == (not packed < math.log(1000))


def test_block_loss_is_that_of_perplexity(stories):
    class Words:
        def __call__(self, text, verbose):
            return {"input_ids": [3 + ord(sign) % 400 for sign in text]}

    model = load(stories)
    text = "Once upon a time there was a little girl who loved to play outside in the park. " * 3
    wanted = perplexity(model, Words(), text, length=32, progress=False)
    blocks = torch.tensor(Words()(text, False)["input_ids"])[: wanted.blocks * 32].view(-1, 32)
    assert block_loss(model, blocks, batch_size=3) == pytest.approx(wanted.loss, rel=1e-5)


def test_quantize_says_that_a_model_is_not_usable(stories, tmp_path, capfd, monkeypatch):
    out = tmp_path / "packed"
    assert main(["quantize", stories, "--bpw", "0.6", "--init", "dual_svid", "--out", str(out)]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("perplexity")]
    assert len(said) == 1 and said[0].endswith(UNUSABLE)
    card = ModelCard.load(out / "README.md")
    assert UNUSABLE in card.text and said[0].split()[1] in card.text and said[0].split()[3] in card.text
    # The card that is pushed keeps the figures.
    hub = stub_hub(monkeypatch, tmp_path)
    monkeypatch.setattr(upload, "HfApi", lambda token=None: hub)
    push_folder(str(out), "me/small")
    pushed = hub.files["README.md"].decode()
    assert UNUSABLE in pushed and said[0].split()[3] in pushed and "me/small" in pushed


def short(monkeypatch, **more):
    monkeypatch.setattr(text_free, "SHORT", {**text_free.SHORT, "tokens": 4096, **more})


def test_quantize_refines_a_model_on_its_own_text(stories, tmp_path, capfd, monkeypatch):
    """At the same bits the default is better than the weights alone, and the line says so."""
    perplexities = []
    short(monkeypatch)
    for options in ((), ("--weights-only",)):
        command = ["quantize", stories, "--bpw", "2.5", "--steps", "10", *options, "--out"]
        assert main([*command, str(tmp_path / f"packed{len(options)}")]) == 0
        (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("perplexity")]
        perplexities.append(float(line.split()[3].replace(",", "")))
    assert perplexities[0] < perplexities[1]
    assert not (tmp_path / "packed0" / "refinement").exists()


def test_a_kill_without_text_is_gone_on_from(stories, tmp_path, capfd, monkeypatch):
    short(monkeypatch, distill_epochs=0.0)
    command = ["quantize", stories, "--bpw", "2.5", "--steps", "10", "--out", str(tmp_path / "out")]

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "note", killed)
    assert main(command) == 130
    monkeypatch.undo()
    short(monkeypatch, distill_epochs=0.0)
    assert main(command) == 2
    assert "add --resume" in capfd.readouterr().err
    assert main([*command, "--resume", "--weights-only"]) == 2
    assert "--weights-only makes none" in capfd.readouterr().err
    assert main([*command, "--resume", "--init", "dual_svid"]) == 2
    assert "quantized alone; give --overwrite in its place" in capfd.readouterr().err
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    assert main([*command, "--resume"]) == 0
    assert not (tmp_path / "out" / "refinement").exists()
    # What was begun can be discarded, too.
    assert main([*command[:-1], str(tmp_path / "other"), "--overwrite", "--init", "dual_svid"]) == 0
    assert not (tmp_path / "other" / "refinement").exists()


def test_tables_that_there_cannot_be_are_refused_before_there_is_text(stories, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["quantize", stories, "--bpw", "2.5", "--embedding-bits", "8", "--out", str(out)]) == 2
    assert "the same value" in capfd.readouterr().err and not out.exists()


def test_weights_alone_where_blocks_are_no_chain_or_latents_are_asked_for(stories, tmp_path, capfd, monkeypatch):
    def refused(self, tokens):
        raise NoChain("its blocks are a tree")

    short(monkeypatch)
    monkeypatch.setattr(BlockList, "check", refused)
    command = ["quantize", stories, "--bpw", "2.5", "--steps", "10", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    assert "note: the weights alone are quantized: its blocks are a tree" in err and "perplexity" in out
    assert not (tmp_path / "out" / "refinement").exists()
    assert main([*command, str(tmp_path / "latent"), "--format", "latent"]) == 0
    assert "a tree" not in capfd.readouterr().err
    assert load(str(tmp_path / "latent")).config.quantization_config.format == "latent"


def test_the_check_can_be_left_out(stories, tmp_path, capfd):
    command = [
        "quantize",
        stories,
        "--bpw",
        "4",
        "--init",
        "dual_svid",
        "--no-check",
        "--out",
        str(tmp_path / "packed"),
    ]
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert "perplexity" not in out and "note: the weights alone" not in err
    assert "## Evaluation" not in (tmp_path / "packed" / "README.md").read_text()


def test_what_cannot_be_checked_is_said(family_dir, stories, tmp_path, capfd, monkeypatch):
    command = ["quantize", family_dir("bert"), "--bpw", "2.5", "--init", "dual_svid", "--out", str(tmp_path / "bert")]
    assert main(command) == 0
    assert "nothing is checked: there is no tokenizer" in capfd.readouterr().err
    monkeypatch.setattr("hf_littlebit.placement.free_memory", lambda device: 1e9)
    assert main(["quantize", stories, "--bpw", "4", "--steps", "5", "--out", str(tmp_path / "packed")]) == 0
    out, err = capfd.readouterr()
    assert "the weights alone are quantized, and nothing is checked: that takes about 2.5 GB" in err
    assert "perplexity" not in out


def test_an_encoder_with_a_tokenizer_is_no_causal_model():
    assert text_free._obstacle(build("bert"), object(), "auto") == "BertForMaskedLM is no causal language model"
    assert text_free._obstacle(build("llama"), object(), "auto") == ""


def test_figures_of_a_card_that_was_edited_are_its_author_s(stories, tmp_path):
    assert main(["quantize", stories, "--bpw", "4", "--init", "dual_svid", "--no-check", "--out", str(tmp_path)]) == 0
    write_card(str(tmp_path), check(3.0, 5.0).evaluation())
    card = ModelCard.load(tmp_path / "README.md")
    found = evaluation_of(card)
    assert found is not None and found["verdict"] == UNUSABLE and found["the dense model's on the same"] == "20.09"
    again = evaluation_of(model_card(str(tmp_path), evaluation=found))
    assert again == found
    card.text = card.text.replace("## Limits", "## My limits")
    assert evaluation_of(card) is None
    card.save(tmp_path / "README.md")
    write_card(str(tmp_path), check(3.0, 3.1).evaluation())
    assert "## My limits" in (tmp_path / "README.md").read_text()
