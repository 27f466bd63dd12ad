"""Saving is all or nothing: kills at every step, full disks, two writers, files of two saves, and what else lies there."""

import errno
import fcntl
import json
import os
import shutil
import sys

import pytest
import torch
from families import build, config, equal_states, load
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_littlebit import LittleBitConfig, latent_model, pack_model, save_topk, size_report
from hf_littlebit.command.cli import main
from hf_littlebit.load.replacement import refused_writes, replacement
from hf_littlebit.load.source import find_source
from hf_littlebit.report.upload import push_folder

DIFFERENT = "these files are of different saves; save again"
SHARDED = {"max_shard_size": "20KB"}
# What a save does to the names in a folder. Python tells of each in an audit event.
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.move", "shutil.rmtree", "open")


def packed(seed):
    """A packed model whose config says `seed`, and whose weights are so many times those of `build`."""
    model = build("llama")
    for value in model.parameters():
        value.data.mul_(seed)
    return pack_model(latent_model(model, config(seed=seed), progress=False))


@pytest.fixture(scope="module")
def models():
    """Two packed models whose configs and tensors differ."""
    return packed(1), packed(2)


def tensors(folder):
    """All tensors that find_source takes for those of the model in `folder`."""
    return {name: value for file in find_source(folder).files for name, value in load_file(file).items()}


def which(folder, models):
    """The seed of the model in `folder`, by its config and by its tensors, which have to agree."""
    source = find_source(folder)
    found = tensors(folder)
    same = [model for model in models if all(torch.equal(model.state_dict()[name], x) for name, x in found.items())]
    assert [model.config.quantization_config.seed for model in same] == [source.quantization.seed]
    return source.quantization.seed


def killed_at(step, folder, save):
    """Run `save` in a process that ends, as by kill -9, at its `step`th event below `folder`; whether it got so far."""
    child = os.fork()
    if child == 0:
        left = [step]

        def count(event, arguments):
            if event in EVENTS and arguments and str(folder) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (the process ends with it)
        sys.addaudithook(count)
        try:
            save()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


# -- a save and its files -------------------------------------------------------------------------------------------------


def test_config_and_every_file_carry_the_id_of_their_save(models, tmp_path):
    ids = []
    for options in ({}, SHARDED, {}):
        models[0].save_pretrained(tmp_path, **options)
        names = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
        metadata = [safe_open(tmp_path / name, framework="pt").metadata() for name in names]
        ids += {each["save_id"] for each in metadata}
        assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["save_id"] == ids[-1]
    assert len(set(ids)) == len(ids) == 3  # a new one each time
    # It is of the files: neither the model that was saved nor the one that is loaded has it, and configs stay equal.
    again = load(tmp_path)
    for model in (models[0], again):
        assert model.config.quantization_config.to_dict() == models[0].config.quantization_config.to_dict()
        assert "save_id" not in model.config.quantization_config.to_dict()
    equal_states(models[0], again)


def mixed(models, folder, options):
    """`folder` with the save of one model, of which the files that come first in the alphabet are another one's."""
    models[0].save_pretrained(folder, **options)
    models[1].save_pretrained(folder / "other", **options)
    return folder / "other"


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-00004.safetensors"])
def test_files_of_two_saves_are_refused(models, tmp_path, file, capfd):
    other = mixed(models, tmp_path, SHARDED)
    shutil.copy(other / file, tmp_path / file)
    for read in (load, find_source, size_report):
        with pytest.raises(ValueError, match=DIFFERENT):
            read(tmp_path)
    assert main(["info", str(tmp_path)]) == 2
    line = capfd.readouterr().err
    assert DIFFERENT in line and file in line
    with pytest.raises(ValueError, match=DIFFERENT):
        push_folder(str(tmp_path), "me/model")


def without_id(folder, *files):
    for file in files:
        with safe_open(folder / file, framework="pt") as stored:
            metadata = {key: value for key, value in stored.metadata().items() if key != "save_id"}
        save_file(load_file(folder / file), folder / file, metadata)


def test_an_older_models_files_load_but_not_with_a_newer_config(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    without_id(tmp_path, "model.safetensors")
    with pytest.raises(ValueError, match=rf"{DIFFERENT}.*config.json \(\w+\) and model.safetensors \(no id\)"):
        load(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    del data["quantization_config"]["save_id"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    equal_states(load(tmp_path), models[0])
    # Files that another program wrote anew say nothing of a save.
    models[0].save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    equal_states(load(tmp_path), models[0])


def test_a_config_in_hand_loads_with_the_files_of_another_save(models, tmp_path):
    models[0].save_pretrained(tmp_path / "a")
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", config=model.config)
    equal_states(again, models[0])


def test_variants_lie_side_by_side(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    models[0].save_pretrained(tmp_path, variant="v2")
    equal_states(load(tmp_path), models[0])
    equal_states(load(tmp_path, variant="v2"), models[0])
    with pytest.raises(ValueError, match=DIFFERENT):  # the plain files would be pushed with the variant's config
        push_folder(str(tmp_path), "me/model")
    models[1].save_pretrained(tmp_path / "other", variant="v2")
    shutil.copy(tmp_path / "other" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=DIFFERENT):
        load(tmp_path)


# -- save_pretrained over a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before, after", [({}, SHARDED), (SHARDED, {}), (SHARDED, {"max_shard_size": "40KB"})])
def test_nothing_of_the_model_before_is_left(models, tmp_path, before, after):
    models[0].save_pretrained(tmp_path / "new", **after)
    models[1].save_pretrained(tmp_path / "over", **before)
    (tmp_path / "over" / "notes.txt").write_text("mine")
    models[0].save_pretrained(tmp_path / "over", **after)
    assert set(os.listdir(tmp_path / "over")) == {*os.listdir(tmp_path / "new"), "notes.txt"}
    equal_states(load(tmp_path / "over"), models[0])


@pytest.mark.parametrize("before, after", [({}, SHARDED), (SHARDED, {})])
def test_save_pretrained_that_is_killed(models, tmp_path, before, after):
    outcomes, step = [], 0
    while not outcomes or outcomes[-1] != "done":
        folder = tmp_path / f"at{step}"
        models[0].save_pretrained(folder, **before)
        step += 1
        done = not killed_at(step, folder, lambda folder=folder: models[1].save_pretrained(folder, **after))
        try:
            outcomes.append("done" if done else which(folder, models))
        except ValueError as error:
            assert DIFFERENT in str(error) or "is missing" in str(error)
            outcomes.append("refused")
    assert outcomes[0] == 1 and which(folder, models) == 2
    # Most kills come before the files are moved: the former model is there.
    assert outcomes.count(1) > 10
    # The next save puts the folder right.
    models[0].save_pretrained(tmp_path / "at5", **after)
    assert which(tmp_path / "at5", models) == 1 and ".saving" not in os.listdir(tmp_path / "at5")


def test_a_save_that_fails_keeps_the_model_before_and_names_the_folder(models, tmp_path, monkeypatch):
    models[0].save_pretrained(tmp_path / "m")

    def full(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise_full(filename)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for folder in ("m", "new"):
        with pytest.raises(OSError, match="No space left on device") as error:
            models[1].save_pretrained(tmp_path / folder)
        assert error.value.filename == str(tmp_path / folder)
    assert which(tmp_path / "m", models) == 1 and sorted(os.listdir(tmp_path / "m")) == [
        *("config.json", "generation_config.json", "model.safetensors")
    ]


def raise_full(filename):
    """What safetensors raises when the disk is full."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


# -- folders that are replaced ------------------------------------------------------------------------------------------------


def files(folder):
    return {name: (folder / name).read_text() for name in sorted(os.listdir(folder)) if (folder / name).is_file()}


def write(text):
    """A writer of three files, in the folder that it is given."""

    def fill(folder):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)

    return fill


def replaced(out, text):
    with replacement(out) as folder:
        write(text)(folder)


def test_a_folder_is_replaced_whole_whenever_the_process_is_killed(tmp_path):
    old = {"config.json": "old", "model.safetensors": "old", "notes.txt": "mine", "tokenizer.json": "old"}
    new = {name: text.replace("old", "new") for name, text in old.items()}
    seen, step, killed = [], 0, True
    while killed:
        step += 1
        parent = tmp_path / str(step)
        out = parent / "out"
        (out / "checkpoints" / "deep").mkdir(parents=True)
        (out / "checkpoints" / "deep" / "state").write_text("1")
        write("old")(out)
        (out / "notes.txt").write_text("mine")
        killed = killed_at(step, parent, lambda out=out: replaced(out, "new"))
        if out.exists():
            assert files(out) in (old, new)
            seen.append(files(out) == new)
        else:  # between the two renames, of which the next writer knows
            assert files(parent / ".out.replaced") == old
            with pytest.raises(ValueError, match="replacing it was interrupted"):
                find_source(out)
            with pytest.raises(KeyError), replacement(out):
                raise KeyError
            assert files(out) == old
        assert (out / "checkpoints" / "deep" / "state").read_text() == "1"
        replaced(out, "new")
        assert os.listdir(parent) == ["out"] and files(out) == new
    assert seen == sorted(seen) and seen[0] is False and seen[-1] is True and step > 10


def test_a_new_folder_appears_complete(tmp_path):
    out = tmp_path / "a" / "b"
    with replacement(out) as folder:
        write("new")(folder)
        assert not out.exists()
    assert len(files(out)) == 3 and os.listdir(tmp_path / "a") == ["b"]
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask
    out.chmod(0o750)
    replaced(out, "newer")
    assert out.stat().st_mode & 0o777 == 0o750
    with pytest.raises(KeyError), replacement(tmp_path / "c" / "d") as folder:
        raise KeyError
    assert os.listdir(tmp_path) == ["a"]


def test_links_mount_points_and_the_working_folder_stay_what_they_are(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    replaced(link, "1")
    assert link.is_symlink() and files(real)["config.json"] == "1"
    monkeypatch.chdir(real)
    inode = real.stat().st_ino
    replaced(".", "2")
    assert real.stat().st_ino == inode and files(real)["config.json"] == "2"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(real))
    replaced(real, "3")
    assert real.stat().st_ino == inode and files(real)["config.json"] == "3"
    assert sorted(os.listdir(real)) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("forbidden", ["mkdir", "link", "rename"])
def test_file_systems_that_forbid_what_a_sibling_needs(tmp_path, monkeypatch, forbidden):
    out = tmp_path / "out"
    out.mkdir()
    write("old")(out)
    (out / "notes.txt").write_text("mine")
    plain = getattr(os, forbidden)

    def refuse(path, *args, **kwargs):
        if forbidden == "link" or os.path.dirname(os.path.realpath(path)) == str(tmp_path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, forbidden, refuse)
    replaced(out, "new")
    assert files(out) == {
        **dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json"), "new"),
        "notes.txt": "mine",
    }
    assert os.listdir(tmp_path) == ["out"] and ".saving" not in os.listdir(out)


def test_the_second_writer_is_refused(tmp_path, monkeypatch, stories, capfd):
    out = tmp_path / "out"
    for exists in (False, True):
        with replacement(out) as folder:
            write("first")(folder)
            for inside in (False, True):
                with pytest.raises(ValueError, match="another process is saving to"), replacement(out, inside):
                    pass
            assert main(["quantize", stories, "--bpw", "1", "--out", str(out), "--overwrite"]) == 2
            assert "another process is saving to" in capfd.readouterr().err
        assert out.exists() and len(files(out)) == 3, exists

    def unknown(lock, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    replaced(out, "without locks")
    assert files(out)["config.json"] == "without locks"


def test_refusals_of_the_system_name_the_path():
    text = "[enforce fail at inline_container.cc:672] . unexpected pos 275520 vs 275408"
    for error in (RuntimeError(text), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(OSError, match="DIR"), refused_writes("DIR"):
            raise error
    # What is no refused write stays what it is.
    others = [
        RuntimeError("PytorchStreamReader failed; inline_container.cc"),
        RuntimeError("size mismatch"),
        OSError("no connection"),
        FileNotFoundError(errno.ENOENT, "No such file", "elsewhere"),
        SafetensorError("invalid header"),
    ]
    for error in others:
        with pytest.raises(type(error)) as found, refused_writes("DIR"):
            raise error
        assert found.value is error


@pytest.mark.parametrize("name", ["m", "new"])
def test_commands_on_a_full_disk(stories, tmp_path, monkeypatch, capfd, name):
    fast = ["quantize", stories, "--bpw", "4", "--init", "dual_svid"]
    assert main([*fast, "--out", str(tmp_path / "m")]) == 0
    before = tensors(tmp_path / "m")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *args, **kwargs: raise_full(args[1]))
    capfd.readouterr()
    assert main([*fast, "--seed", "3", "--out", str(tmp_path / name), "--overwrite"]) == 1
    assert capfd.readouterr().err.endswith(f"littlebit: error: {tmp_path / name}: No space left on device\n")
    assert os.listdir(tmp_path) == ["m"]
    after = tensors(tmp_path / "m")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_overwrite_keeps_other_files(stories, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    packed(1).save_pretrained(tmp_path, **SHARDED)
    assert main(["quantize", stories, "--bpw", "4", "--init", "dual_svid", "--out", str(tmp_path), "--overwrite"]) == 0
    # A card that a person wrote is completed by what the Hub reads, above it.
    assert (tmp_path / "README.md").read_text().endswith("\n---\nmine")
    assert [name for name in os.listdir(tmp_path) if name.startswith("model")] == ["model.safetensors"]
    assert load(tmp_path).config.hidden_size == 64 and load(tmp_path).config.num_hidden_layers == 5


def test_a_card_that_is_no_yaml_costs_no_model(stories, tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\ntitle: my model: v2\n---\nnotes\n")
    words = ["--bpw", "4", "--init", "dual_svid", "--weights-only", "--no-check", "--out", str(tmp_path), "--overwrite"]
    assert main(["quantize", stories, *words]) == 0
    assert (
        load(tmp_path).config.num_hidden_layers == 5 and "title: my model: v2" in (tmp_path / "README.md").read_text()
    )


def test_out_that_is_a_link_to_nothing(stories, tmp_path, capfd):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["quantize", stories, "--bpw", "4", "--out", str(tmp_path / "link")]) == 2
    assert "is a link to" in capfd.readouterr().err and os.listdir(tmp_path) == ["link"]


def test_teacher_logits_are_replaced_whole(tmp_path, monkeypatch):
    model, batch = build("llama"), {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    save_topk(model, [batch], tmp_path / "k", k=4)
    before = {name: (tmp_path / "k" / name).read_bytes() for name in os.listdir(tmp_path / "k")}

    def full(file, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(OSError, match="No space left") as error:
        save_topk(model, [batch], tmp_path / "k", k=8)
    assert error.value.filename == str(tmp_path / "k")
    assert before == {name: (tmp_path / "k" / name).read_bytes() for name in os.listdir(tmp_path / "k")}


# -- options that a downloaded config gives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"dequantize": True}, {"svd_device": "abacus"}, {"share_inputs": True, "workers": 9}]
)
def test_loading_options_of_a_files_config_are_ignored(models, tmp_path, caplog, option):
    models[0].save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["quantization_config"].update(option)
    (tmp_path / "config.json").write_text(json.dumps(data))
    model = load(tmp_path)
    equal_states(model, models[0])
    read = model.config.quantization_config
    assert (read.dequantize, read.svd_device, read.share_inputs, read.workers) == (False, None, None, 1)
    assert next(iter(option)) in caplog.text and "ignored" in caplog.text
    # The user's own are obeyed, also where the file says the same.
    dense = load(tmp_path, quantization_config=LittleBitConfig(dequantize=True))
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_loading_options_in_a_users_dict_are_obeyed(family_dir):
    options = {"quant_method": "littlebit", "bpw": 2.5, "init": "dual_svid", "svd_device": "abacus"}
    with pytest.raises(ValueError, match="abacus"):
        load(family_dir("llama"), quantization_config=options)
