"""The tuner without a GPU: its candidates, its search with a device that is made up, its processes, its file."""

import json
import math
import os
import time

import pytest
import torch
from hf_littlebit.kernels import candidates, tuner, tuning
from hf_littlebit.kernels.workers import Workers

CPU = torch.device("cpu")
LAYERS = [(4096, 4096, (184,)), (11008, 4096, (280, 280)), (64, 96, (8,)), (1024, 28672, (33, 7, 64))]
GROUPS = [((4096, 1024, 1024), 4096, ((184,), (40,), (40,))), ((64, 32), 96, ((8, 8, 8, 8), (8,)))]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No tile sizes of a file, and a device of 132 cores."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setenv("LITTLEBIT_TILES", str(tmp_path))
    monkeypatch.setattr(tuning, "cores", lambda device: 132)
    tuning.forget()
    yield
    monkeypatch.undo()
    tuning.forget()


def cases(dtype=torch.bfloat16, batches=(1, 4, 16, 100, 2048)):
    return list(candidates.cases(CPU, LAYERS, GROUPS, batches, dtype, True))


def power(value):
    return value > 0 and value & (value - 1) == 0


def test_every_case_once():
    found = cases()
    assert len({case.key for case in found}) == len(found)
    layers = [case for case in found if len(case.outs) == 1]
    assert len(layers) == len(LAYERS) * (1 + 2 * 3)  # few tokens; three buckets, forward and gradient
    assert sorted({case.tokens for case in layers}) == [4, 16, 128, 2048]
    assert [case.outs for case in found if len(case.outs) > 1] == [group[0] for group in GROUPS]
    assert not any(case.tokens <= 4 for case in cases(batches=(16,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("units", [True, False])
def test_candidates_are_sizes_that_the_kernels_take(monkeypatch, dtype, units):
    monkeypatch.setattr(tuning, "multiplies_bf16", lambda device: units)
    tuning.forget()
    met = set()
    for case in cases(dtype):
        start = candidates.start(CPU, case)
        met.add(type(start).__name__)
        for turn in range(candidates.ROUNDS):
            found = candidates.changes(start, case, turn)
            assert len(set(found)) == len(found) <= 40 and start not in found
            assert not found or turn
            for config in found:
                assert type(config) is type(start)
                sizes = config._asdict()
                terms, unpacked = sizes.pop("terms", 0), sizes.pop("unpacked", 0)
                counts = {name: value for name, value in sizes.items() if name.startswith(("stages", "splits"))}
                assert all(power(value) for name, value in sizes.items() if name not in counts)
                assert all(1 <= value <= 32 for value in counts.values())
                if isinstance(config, tuning.Few):
                    assert config.warps_two >= max(map(len, case.ranks))
                    assert max(config.columns_one * config.words_one, config.columns_two * config.words_two) <= 512
                elif isinstance(config, tuning.Tiles):
                    assert terms == start.terms and (not unpacked or (terms == 1 and dtype == torch.bfloat16))
                    assert min(config.tokens_one, config.tokens_two) >= 16
                    assert max(config.tokens_one, config.tokens_two) <= case.tokens
    assert met == ({"Few", "Tiles"} if units else {"Decode", "Tiles"})


def test_equal_kernels_have_one_key():
    trial = pytest.importorskip("hf_littlebit.kernels.trial")
    pytest.importorskip("triton")
    one, two, odd = (
        candidates.Case("", (out,), into, ((rank,),), 64, torch.bfloat16, False)
        for out, into, rank in ((4096, 4096, 192), (8192, 2048, 320), (4100, 4096, 200))
    )
    tiles = tuning.Tiles(64, 64, 4, 3, 2, 64, 64, 4, 3, 2, 2, 2)
    kernel_keys = trial.kernel_keys(one, tiles)
    assert set(kernel_keys) == {"one", "two"}
    assert trial.kernel_keys(two, tiles._replace(splits_one=4, splits_two=3)) == kernel_keys  # other shapes and splits
    other = trial.kernel_keys(one, tiles._replace(warps_two=8))
    assert other["one"] == kernel_keys["one"] and other["two"] != kernel_keys["two"]
    assert trial.kernel_keys(odd, tiles)["two"] != kernel_keys["two"]  # rows that are no multiple of 16
    assert trial.kernel_keys(one._replace(dtype=torch.float16), tiles)["two"] != kernel_keys["two"]
    assert set(trial.kernel_keys(one, tiles._replace(unpacked=1, terms=1))) == {"both"}


class Device:
    """A device whose times and errors are functions of the tiles."""

    def __init__(self, cost, error=lambda case, config: 1e-3, fits=lambda job: True):
        self.cost, self.wrong, self.fits = cost, error, fits
        self.ran, self.saved = [], []

    def run(self, jobs, deadline):
        self.ran += jobs
        return [self.fits(job) for job in jobs]

    def trial(self, case):
        device = self

        class Trial:
            def microseconds(self, configs, side, rounds):
                return [device.cost(case, config) for config in configs]

            def error(self, config):
                return device.wrong(case, config)

        return Trial()

    def search(self, best, seconds=60.0):
        said = []
        save = lambda: self.saved.append(dict(best))  # noqa: E731
        tuner.search(best, self.run, self.trial, time.monotonic() + seconds, save, said.append)
        return said


@pytest.fixture
def best(monkeypatch):
    """What is found of one layer at 512 tokens, before the search; kernels are told apart by their fields alone."""

    def kernel_keys(case, config):
        fields = config._asdict()
        return {
            side: (case.key, *(value for name, value in fields.items() if name.endswith(side) or side == "both"))
            for side in ("one", "two")
        } | {"both": (case.key, config.ranks, config.outputs, config.words, config.unpacked)}

    monkeypatch.setattr(tuner, "kernel_keys", kernel_keys)
    case = candidates.Case("tiles 1", (4096,), 4096, ((184,),), 512, torch.bfloat16, False)
    return {case: tuner.Found(case, candidates.start(CPU, case))}


def distance(case, config):
    """Least for four warps, four stages and two splits of the first product, 64 outputs, and four words."""
    return (
        10
        + abs(config.warps_one - 4)
        + abs(config.splits_one - 2)
        + abs(config.outputs - 64) / 64
        + (config.words != 4)
        + 3 * config.unpacked
    )


def test_the_search_keeps_the_fastest_and_saves_after_every_round(best):
    (case,) = best
    before = distance(case, best[case].config)
    device = Device(distance)
    device.search(best)
    config = best[case].config
    assert (config.warps_one, config.splits_one, config.outputs, config.words, config.unpacked) == (4, 2, 64, 4, 0)
    assert best[case].before == before and best[case].after == pytest.approx(distance(case, config))
    assert len(device.saved) == candidates.ROUNDS
    assert device.saved[0][case].after == before  # the tiles of today are timed and written first
    assert len({(job.side, job.config) for job in device.ran}) == len(device.ran)  # nothing is compiled twice


def test_what_is_wrong_is_never_chosen(best):
    (case,) = best
    for wrong in (0.1, math.inf, math.nan):
        found = dict(best)
        device = Device(distance, lambda case, config, wrong=wrong: wrong if config.words == 4 else 1e-3)
        said = device.search(found)
        assert found[case].config.words == 2 and found[case].config.warps_one == 4
        assert any("wrong" in text for text in said)


def test_what_fails_is_passed_over(best):
    (case,) = best
    found = dict(best)
    Device(distance, fits=lambda job: job.config.warps_two == 8).search(found)
    assert found[case].config.warps_two == 8 and found[case].config.words == 4
    # It fits, but no graph can hold it.
    found = dict(best)
    Device(lambda case, config: math.inf if config.words == 4 else distance(case, config)).search(found)
    assert found[case].config.words == 2


def test_a_start_that_does_not_run_is_not_written(best):
    (case,) = best
    device = Device(distance, fits=lambda job: None)
    device.search(best)
    assert best[case].after == math.inf and len(device.ran) > 0


def test_noise_changes_nothing(best):
    (case,) = best
    start = best[case].config
    Device(lambda case, config: 10 if config == start else 9.95).search(best)
    assert best[case].config == start


def test_the_time_is_over(best):
    (case,) = best
    device = Device(distance)
    device.search(best, seconds=-1)
    assert not device.ran and not device.saved and best[case].after == math.inf


def test_what_was_found_is_saved_when_the_device_fails(best):
    (case,) = best
    device = Device(distance)

    def fail(case):
        if best[case].after < math.inf:
            raise RuntimeError("CUDA error")
        return Device.trial(device, case)

    device.trial = fail
    with pytest.raises(RuntimeError, match="CUDA error"):
        device.search(best)
    assert device.saved[-1][case].after < math.inf


def test_a_file_is_extended(monkeypatch, tmp_path):
    """`tune` itself, with a device that is made up, on top of a file that another model's tuning has written."""
    device = Device(lambda case, config: 5.0 if case.tokens > 4 else math.inf)
    monkeypatch.setattr(tuner, "current_device", lambda: CPU)
    monkeypatch.setattr(tuner, "Trial", device.trial)
    monkeypatch.setattr(tuner, "kernel_keys", lambda case, config: {"both": (case, config)})
    monkeypatch.setattr(Workers, "run", lambda self, jobs, deadline: device.run(jobs, deadline))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    other = {"few 8x8 8": [32, 8, 2, 32, 4, 2]}
    tuner.write_configs(tmp_path / "cpu.json", {"configs": other})
    result = tuner.tune(LAYERS[:1], GROUPS[:1], (1, 16), folder=tmp_path, say=lambda text: None)
    assert result.path == tmp_path / "cpu.json"
    # Few tokens could not be timed: they are left to the rule.
    assert [one.case.key for one in result.found] == ["tiles 4096x4096 184 16 1 forward"]
    configs = json.loads(result.path.read_text())["configs"]
    assert set(configs) == {*other, "tiles 4096x4096 184 16 1 forward"}
    assert tuning.tiles(CPU, 4096, 4096, (184,), 16, torch.bfloat16, False) == result.found[0].config
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
    result.path.write_text("{")
    with pytest.raises(RuntimeError, match="delete it, or measure again"):
        tuner.tune(LAYERS[:1], (), (16,), folder=tmp_path)


def work(job):
    """What the processes of the tests below do."""
    if job == "raise":
        raise ValueError("does not fit")
    if job == "die":
        os._exit(3)
    if job == "hang":
        time.sleep(100)


@pytest.mark.slow
@pytest.mark.subprocess
def test_processes_that_die_or_hang_are_replaced():
    with Workers(work, 2, limit=25.0) as pool:  # a busy machine starts a process in many seconds
        jobs = ["fine", "raise", "die", "fine", "hang", "fine", "die", "fine"]
        assert pool.run(jobs, time.monotonic() + 100) == [True, False, False, True, False, True, False, True]
        assert "ValueError: does not fit" in pool.failures and any("ended with 3" in text for text in pool.failures)
        start = time.monotonic()
        assert pool.run(["fine", "hang", "hang", "fine"], start + 6) == [True, None, None, None]
        assert time.monotonic() - start < 9
        processes = list(pool._processes.values())
    assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
@pytest.mark.subprocess
def test_processes_that_never_live_are_an_error():
    with Workers(work, 1) as pool, pytest.raises(RuntimeError, match="end before they have tried one"):
        pool.run(["die"] * 10, time.monotonic() + 100)


def test_more_tokens_need_no_other_kernels(monkeypatch):
    """What triton_cases.py asserts on a GPU, by what kernels are specialized on: 3, 100 or 1,000 tokens compile nothing."""
    trial = pytest.importorskip("hf_littlebit.kernels.trial")
    pytest.importorskip("triton")
    monkeypatch.setattr(tuning, "shared_memory", lambda device: 227 << 10)

    def kernels(tokens):
        found = set()
        for outs, ranks in (((129,), ((40, 8),)), ((129, 129), ((40, 8), (40, 8)))):
            if tokens <= 4 or len(outs) == 1:
                size = tokens if tokens <= 4 else tuning.bucket(tokens)
                case = candidates.Case("", outs, 257, ranks, size, torch.float32, False)
                kernel_keys = trial.kernel_keys(case._replace(tokens=tokens), candidates.start(CPU, case))
                found |= {kernel for steps in kernel_keys.values() for kernel in steps}
        return found

    warm = set().union(*map(kernels, (1, 2, 4, 16, 32, 64, 128, 4096)))
    for tokens in (3, 5, 15, 17, 33, 48, 100, 1000, 3000):
        assert kernels(tokens) <= warm, tokens
