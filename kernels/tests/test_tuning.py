"""Tile sizes: the rule fits every shape, a measured file is obeyed."""

import json

import pytest
import torch
from hf_littlebit.kernels import tuning

CPU = torch.device("cpu")
RANKS = (296, 296)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No remembered choices, and an empty folder of measured ones."""
    caches = (tuning._measured, tuning.decode, tuning.decode_group, tuning.tiles)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setenv("LITTLEBIT_TILES", str(tmp_path / "nothing"))
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def power(value):
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("cores", [1, 16, 132, 304])
@pytest.mark.parametrize(
    "out, into, rank", [(1, 5, 8), (33, 70, 16), (1024, 4096, 24), (8192, 28672, 3168), (128256, 4096, 8)]
)
def test_the_rule_gives_sizes_that_triton_takes(cores, out, into, rank):
    decode = tuning._decode_rule(cores, out, into, (rank, rank))
    assert all(map(power, decode)) and decode.splits <= 32
    # Signs of a tile in a thread's registers.
    assert 32 * decode.columns_one * decode.words_one <= 64 * 32 * decode.warps_one
    assert 32 * decode.columns_two * decode.words_two <= 64 * 32 * decode.warps_two
    for tokens in (16, 64, 128, 4096):
        for terms in (0, 1, 2, 3):
            tiles = tuning._tiles_rule(cores, into, out, (rank, rank), tokens, terms)
            assert all(map(power, tiles._replace(stages_one=1, stages_two=1, terms=1, unpacked=1)))
            assert tiles.terms == terms and bool(tiles.unpacked) == (
                tokens > 1024 and tokens * 2 * rank * (out + into) > tuning.MUCH and terms == 1
            )
            # A row of words is 32 outputs; the matrix units take 16 tokens or more.
            assert min(tiles.tokens_one, tiles.tokens_two) >= 16 and min(tiles.ranks, tiles.outputs) >= 32
            assert max(tiles.tokens_one, tiles.tokens_two) <= tokens


def test_buckets_are_few():
    assert {tuning.bucket(tokens) for tokens in range(1, 100000)} == {16, 32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert all(tuning.bucket(tokens) >= tokens for tokens in range(1, 4097))


def test_precision_follows_the_dtype():
    assert [tuning.terms(CPU, dtype, 16) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [3, 1, 2]
    assert [tuning.terms(CPU, dtype, 512) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [3, 1, 2]


def test_a_group_takes_the_tiles_of_its_widest_layer(fresh, monkeypatch):
    monkeypatch.setattr(tuning, "cores", lambda device: 16)
    alone = tuning.decode(CPU, 4096, 4096, (80, 80))
    assert tuning.decode_group(CPU, (4096,), 4096, ((80, 80),)) == alone
    assert tuning.decode_group(CPU, (1024, 4096, 1024), 4096, ((24, 24), (80, 80), (24, 24))) == alone
    assert tuning.decode(CPU, 1024, 4096, (24, 24)) != alone


def test_a_measured_file_is_obeyed(fresh):
    decode, tiles = tuning.Decode(16, 4, 2, 4, 16, 4, 2), tuning.Tiles(64, 32, 4, 3, 2, 64, 64, 8, 2, 1, 2, 1)
    rule = tuning.tiles(CPU, 64, 160, RANKS, 128, torch.bfloat16, True)
    configs = {
        tuning._key("decode", 64, 160, RANKS): decode,
        tuning._key("tiles", 64, 160, RANKS, 128, 1, "forward"): tiles,
    }
    (fresh / "cpu.json").write_text(json.dumps({"device": "cpu", "configs": configs}))
    for cache in (tuning._measured, tuning.decode, tuning.decode_group, tuning.tiles):
        cache.cache_clear()
    assert tuning.decode(CPU, 64, 160, RANKS) == decode
    assert tuning.tiles(CPU, 64, 160, RANKS, 128, torch.bfloat16, False) == tiles
    assert tuning.tiles(CPU, 64, 160, RANKS, 128, torch.bfloat16, True) == rule
    assert tuning.tiles(CPU, 64, 160, RANKS, 128, torch.float32, False).terms == 3


def test_the_users_folder_goes_before_the_package(fresh, monkeypatch):
    ours, theirs = fresh / "package", fresh / "user"
    for folder, columns in ((ours, 16), (theirs, 64)):
        folder.mkdir()
        configs = {tuning.decode_key((64,), 160, (RANKS,), "decode"): [columns, 4, 2, 4, 16, 4, 2]}
        if folder == ours:
            configs[tuning.decode_key((32,), 160, (RANKS,), "decode")] = [8, 4, 2, 4, 16, 4, 2]
        (folder / "cpu.json").write_text(json.dumps({"device": "cpu", "configs": configs}))
    monkeypatch.setattr(tuning, "CONFIGS", ours)
    monkeypatch.setenv("LITTLEBIT_TILES", str(theirs))
    tuning.forget()
    assert tuning.decode(CPU, 64, 160, RANKS).columns_one == 64
    assert tuning.decode(CPU, 32, 160, RANKS).columns_one == 8  # what only the package knows
    monkeypatch.delenv("LITTLEBIT_TILES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh))
    assert tuning.user_folder() == fresh / "hf_littlebit"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"tiles": {}}',
        '{"configs": {"tiles 8x8 8 16 1 forward": [1, 2]}}',
        '{"configs": {"few 8x8 8": ["a", 8, 2, 32, 4, 2]}}',
        '{"configs": {"other 8x8 8": [1]}}',
    ],
)
def test_a_damaged_file_is_an_error_with_its_path(fresh, text):
    (fresh / "cpu.json").write_text(text)
    for cache in (tuning._measured, tuning.decode):
        cache.cache_clear()
    with pytest.raises(RuntimeError, match=r"cpu\.json holds no tile sizes .*; delete it, or measure again"):
        tuning.decode(CPU, 64, 160, RANKS)
