"""The benchmarks of GPUs where there is none: their bookkeeping, the marks, and what they refuse."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hf_littlebit.kernels import gpu, reference
from transformers import LlamaConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"
has_triton = importlib.util.find_spec("triton") is not None
has_gpu = torch.cuda.is_available()
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}


@pytest.fixture
def load(monkeypatch):
    """A function that imports a script of kernels/benchmarks by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)


def script(name, *arguments, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# -- the record of a run ----------------------------------------------------------------------------------------------------


def test_a_record_is_whole_after_every_row(load, tmp_path, capsys):
    file = tmp_path / "rows.json"
    record = load("record").Record("test", file, {"machine": "this"}, seconds=60)
    for index in range(3):
        record.add({"index": index})
        found = json.loads(file.read_text())
        assert len(found["rows"]) == index + 1 and found["machine"] == "this" and found["benchmark"] == "test"
    assert record.attempt("good", lambda: 5) == 5
    assert record.attempt("bad", lambda: 1 / 0) is None and "failed: bad: ZeroDivisionError" in capsys.readouterr().err
    record.seconds = -1
    assert record.attempt("late", lambda: pytest.fail("too late")) is None
    found = json.loads(file.read_text())
    assert found["failures"] == [{"what": "bad", "error": "ZeroDivisionError: division by zero"}]
    assert found["left_out"] == ["late"] and os.listdir(tmp_path) == ["rows.json"]


# -- layers -----------------------------------------------------------------------------------------------------------------


def test_places_with_a_mark_come_first(load):
    bench = load("bench_gpu")
    found = bench.places(bench.SHAPES, bench.BATCHES, True)
    assert len(found) == len(set(found)) == 48 and sum(place.gradient for place in found) == 12
    marked = [bench.marked(place) for place in found]
    assert marked == sorted(marked, reverse=True) and sum(marked) == 30
    assert found[0] == (8192, 28672, 1, False)


@pytest.mark.parametrize("paths", [1, 2])
def test_ranks_keep_to_the_bits(load, paths):
    bench = load("bench_gpu")
    for out, into in bench.SHAPES:
        for bpw in bench.BPW:
            ranks = bench.ranks_of(out, into, bpw, paths)
            bits = sum(ranks) * (out + into + 16) + 16 * paths * (out + into)
            assert len(ranks) == paths and 0.9 * bpw * out * into < bits <= bpw * out * into


def test_rows_of_layers(load, monkeypatch):
    """On a CPU with the reference as the kernel: everything but the graphs."""
    bench, record = load("bench_gpu"), load("record").Record("gpu", None, {})
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "COLD", 1 << 16)
    monkeypatch.setattr(gpu, "products", reference.products)

    def turns(candidates, rounds):
        return {name: [call(index) for index in range(3)] and 2.0 + len(name) for name, call in candidates.items()}

    monkeypatch.setattr(bench, "turns", turns)
    kinds = [(0.9, 1), (0.9, 2)]
    for gradient in (False, True):
        rows = bench.measure(bench.Place(96, 160, 5, gradient), kinds, 3, record)
        assert [row["paths"] for row in rows] == [1, 2] and all(row["gradient"] is gradient for row in rows)
        assert all(row["x_bf16"] == round(6 / 14, 2) and row["error"] < bench.LIMIT for row in rows)
    row = bench.measure_shared("q/k/v", 0.01, 1, 3)
    assert row["apart"] == 7.0 and row["paths"] == 1
    bench.warm("1/2", [bench.Place(96, 160, 5), bench.Place(96, 160, 5, True)], kinds[:1], record)
    assert not record.failures
    monkeypatch.setattr(gpu, "products", lambda *a: [1.1 * y for y in reference.products(*a)])
    bench.measure(bench.Place(96, 160, 5), kinds[:1], 3, record)
    assert "the product is wrong by" in record.failures[0]["error"]


@pytest.mark.subprocess
@pytest.mark.skipif(has_gpu, reason="there is a GPU")
@pytest.mark.parametrize(
    "name, arguments", [("check_gpu.py", ()), ("bench_gpu.py", ()), ("models_gpu.py", ("llama2-7b",))], ids=str
)
def test_without_a_gpu_a_sentence_says_so(name, arguments):
    done = script(name, *arguments)
    assert (
        done.returncode == 1
        and "GPU" in done.stderr
        and "Traceback" not in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.skipif(not has_triton or os.environ.get("TRITON_INTERPRET") == "1", reason="kernels cannot be compiled")
def test_host_time_against_a_driver_that_does_nothing(tmp_path):
    done = script("host_time.py", "--idle", "--tokens", 1, "--blocks", 2, "--calls", 5, "--out", tmp_path / "host.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "host.json").read_text())
    assert found["driver"] == "idle" and not found["failures"] and found["machine"]["kernel"].startswith("triton")
    names = {row["call"] for row in found["rows"]}
    assert names >= {"LittleBitLinear, one path", "gpu.products, one path", "q/k/v: sharing x"}
    assert len(found["rows"]) == 2 * len(names) and all(0 < row["us"] < 1e5 for row in found["rows"])
    assert "inference_mode, 1" in done.stdout


def test_whole_models(load, monkeypatch, tmp_path, capsys):
    config = LlamaConfig(**TINY, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    models = load("models_gpu")
    from hf_littlebit.report.bench.contender import Setting

    monkeypatch.setattr(
        models, "settings", lambda: [Setting(6, 3, 2, "eager"), Setting(5, 3), Setting(5, 3, 1, "compiled")]
    )
    out = tmp_path / "models.json"
    common = [str(tmp_path / "config.json"), "--bpw", "2.5", "--device", "cpu", "--out", str(out), "--rounds", "2"]
    for more, rows in ((["--modes", "eager", "plain"], 2), (["--modes", "plain", "--warm"], 0)):
        monkeypatch.setattr(sys, "argv", ["models_gpu.py", *common, *more])
        assert models.main() == 0
        found = json.loads(out.read_text())
        assert (
            len(found["rows"]) == rows and set(found["load_seconds"]) == {"dense", "packed"} and not found["failures"]
        )
        if rows:
            assert found["rows"][0]["batch"] == 2 and found["rows"][0]["ratio"]["decode"] > 0
            assert (
                found["rows"][0]["models"]["packed"]["decode_ms"]
                and not found["rows"][1]["models"]["dense"]["decode_ms"]
            )
            assert "packed / dense" in capsys.readouterr().out


# -- the whole check --------------------------------------------------------------------------------------------------------


def layer_rows(load, speed):
    """Rows as bench_gpu.py writes them, where packed layers are `speed` times as fast as dense ones."""
    bench = load("bench_gpu")
    rows = []
    for place in bench.places(bench.SHAPES, bench.BATCHES, True):
        for bpw, paths in ((bpw, paths) for bpw in bench.BPW for paths in bench.PATHS):
            about = {"out": place.out, "in": place.into, "batch": place.batch, "gradient": place.gradient}
            rows.append({**about, "bpw": bpw, "paths": paths, "bf16": 100.0, "packed": 100.0 / speed * paths})
    return rows


def model_row(mode, prompt, batch, prefill, decode):
    speeds = {kind: {"prefill": 700.0, "decode": 33.0} for kind in ("dense", "packed")}
    return {
        "mode": mode,
        "prompt": prompt,
        "batch": batch,
        "models": speeds,
        "ratio": {"prefill": prefill, "decode": decode},
    }


def recorded(load, speed=30.0):
    calls = {"nn.Linear": 18.0, "LittleBitLinear, one path": 29.0}
    host = [
        {"call": call, "tokens": tokens, "guard": "no_grad", "us": us + tokens}
        for call, us in calls.items()
        for tokens in (1, 32)
    ]
    shared = [{"layers": "q/k/v", "bpw": 0.1, "paths": 1, "apart": 18.0, "together": 9.0}]
    return {
        "cases": {"result": {"counts": {"passed": 137}, "failures": []}, "failed": {}},
        "host": {"result": {"driver": "real", "rows": host}},
        "bench": {"result": {"floor_us": 2.0, "rows": layer_rows(load, speed), "shared": shared}},
        "llama2-7b": {"result": {"rows": [model_row("plain", 32, 1, 1.0, 2.0), model_row("plain", 512, 1, 1.1, 2.0)]}},
        "train": {"result": [{"bpw": 0.3, "ratio": 0.8}, {"bpw": 0.55, "ratio": 0.9}]},
        "llama-3.2-1b": {"left_out": "10 s were left, 20 are needed"},
    }


def test_marks_are_compared_with_what_was_measured(load):
    module = load("marks")
    found = {mark.name: mark for mark in module.marks(recorded(load))}
    verdict = {name: mark.verdict for name, mark in found.items()}
    assert verdict["cases that fail"] == "PASS" and found["cases that fail"].note == "137 passed"
    assert verdict["host µs of an eager call, 1 token(s)"] == "PASS"
    assert verdict["host µs of an eager call, 32 token(s)"] == "MISS"
    assert found["host µs of an eager call, 32 token(s)"].note == "nn.Linear 50.0"
    first = found["1 token, 0.1, 8192x28672: times dense"]
    assert first.verdict == "PASS" and first.found == pytest.approx(30) and first.note == "two paths: 15.00"
    assert found["1 token, 0.1, 4096x4096: times two empty launches"].found == pytest.approx(100 / 30 / 2)
    assert found["4 tokens, 0.1: times one token"].found == 1.0
    assert verdict["64 tokens, 0.55, every shape: times dense"] == "PASS"
    assert verdict["llama2-7b, plain decode: times dense"] == "PASS"
    assert verdict["llama2-7b, plain prefill of 512: times dense"] == "MISS"
    assert verdict["llama2-7b, compiled decode: times dense"] == "not measured"
    assert (
        verdict["a training step, 0.3: times dense"] == "" and found["a training step, 0.55: times dense"].found == 0.9
    )
    text = module.table(list(found.values()))
    assert text.splitlines()[-1] == "19 PASS, 2 MISS, 2 not measured"


def test_marks_of_nothing_are_not_measured(load):
    module = load("marks")
    for parts in ({}, {"bench": {"result": None}, "cases": {"result": None}, "train": {"result": None}, "host": {}}):
        found = module.marks(parts)
        assert found and all(mark.verdict == "not measured" for mark in found)
        assert "0 PASS, 0 MISS" in module.table(found)
    idle = {
        "host": {"result": {"driver": "idle", "rows": [{"call": "LittleBitLinear, one path", "tokens": 1, "us": 1.0}]}}
    }
    assert all(mark.verdict == "not measured" for mark in module.marks(idle))


def test_the_worst_shape_counts_and_is_named(load):
    parts = recorded(load)
    for row in parts["bench"]["result"]["rows"]:
        if (row["out"], row["in"], row["batch"]) == (1024, 4096, 16):
            row["packed"] = 125.0
    parts["cases"] = {
        "result": {"counts": {"passed": 9}},
        "failed": {"triton_cases-2": {"rc": None}, "other": {"rc": 1}},
    }
    found = {mark.name: mark for mark in load("marks").marks(parts)}
    worst = found["16 tokens, 0.55, every shape: times dense"]
    assert worst.verdict == "MISS" and worst.found == 0.8 and worst.note.startswith("1024x4096")
    assert found["cases that fail"].found == 1 and "cut off: triton_cases-2" in found["cases that fail"].note


def test_a_part_may_fail_without_the_others(load, monkeypatch, tmp_path, capsys):
    check = load("check_gpu")
    monkeypatch.setattr(check, "device", lambda: {"name": "A GPU (80GB)"})
    works = {
        "compile": "raise SystemExit('no compiler')",
        "cases": "print('hello')",
        "host": 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'{"driver": "real", "rows": []}\')',
        "bench": "import time; time.sleep(60)",
        "train": "print('never')",
    }
    monkeypatch.setattr(check, "LIMITS", {**check.LIMITS, "bench": 1})
    monkeypatch.setattr(check, "LEAST", 0)

    def jobs_of(part, folder, *_):
        return [check.Job(part, part, [sys.executable, "-c", works[part], str(folder / f"{part}.json")])]

    monkeypatch.setattr(check, "jobs_of", jobs_of)
    start = time.monotonic()
    assert check.check(["compile", "cases", "host", "bench"], tmp_path, 100) == 1
    assert time.monotonic() - start < 30
    monkeypatch.setattr(check, "LEAST", 20)
    assert check.check(["train"], tmp_path, 5) == 1
    files = sorted(file.name for file in tmp_path.iterdir())
    assert len(files) == 3 and files[0].startswith("a-gpu-80gb-2") and files[-1] == "check-gpu.log"
    found = json.loads((tmp_path / files[0]).read_text())
    parts = found["parts"]
    assert [parts[name]["ok"] for name in ("compile", "cases", "host", "bench")] == [False, True, True, False]
    assert (
        "no compiler" in parts["compile"]["failed"]["compile"]["tail"]
        and parts["bench"]["failed"]["bench"]["rc"] is None
    )
    assert parts["host"]["result"]["driver"] == "real" and found["versions"]["torch"] and found["marks"]
    later = json.loads((tmp_path / files[1]).read_text())
    assert "s were left, 20 are needed" in later["parts"]["train"]["left_out"]
    assert "not measured" in capsys.readouterr().out
    both = check.summary([tmp_path / files[0], tmp_path / files[1]])
    assert both == load("marks").table(load("marks").marks(parts))


def test_every_part_has_its_processes(load, tmp_path):
    check = load("check_gpu")
    for part in check.PARTS:
        jobs = check.jobs_of(part, tmp_path, 16, 100, True)
        assert (
            (jobs or part == "generate")
            and len({job.name for job in jobs}) == len(jobs)
            and all(job.part == part for job in jobs)
        )
        for job in jobs:
            named = [word for word in job.command if word.endswith(".py")]
            assert len(named) == 1 and Path(named[0]).is_file()


@pytest.mark.subprocess
def test_a_share_of_the_tests(tmp_path):
    (tmp_path / "test_four.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test_n(n):\n"
        "    if n == 4: pytest.skip('four')\n    assert n != 2\n"
    )
    (tmp_path / "claims").mkdir()
    found = []
    for count in (3, None):
        environment = {
            "LITTLEBIT_SHARE": str(tmp_path / "claims"),
            "LITTLEBIT_RESULTS": str(tmp_path / "lines"),
            "PYTHONPATH": str(FOLDER),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "share",
            "-p",
            "no:cacheprovider",
            *(f"{tmp_path / 'test_four.py'}::test_n[{n}]" for n in (range(count) if count else ())),
            *([] if count else [str(tmp_path / "test_four.py")]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        found.append(done.returncode)
    assert found == [1, 0]  # the first had three of the tests, the second those that were left
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [(line["test"][-3:], line["outcome"]) for line in lines] == [
        ("[0]", "passed"),
        ("[1]", "passed"),
        ("[2]", "failed"),
        ("[3]", "passed"),
        ("[4]", "skipped"),
    ]
    assert "assert 2 != 2" in lines[2]["error"]
