"""Merged copies on a model: which layers get one, and that nothing else changes."""

from __future__ import annotations

import copy
import filecmp
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import factorlm.inference.packing as packing
from factorlm.cli.generate import _keep_copies
from factorlm.errors import ConfigError
from factorlm.hf import load
from factorlm.inference import (
    LatencyTable,
    LayerCase,
    TokenLatency,
    pack_,
    premerge_,
    premerged_layers,
    unpack_,
    unpremerge_,
)
from factorlm.inference.latency import save_table, table_path
from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    DenseConfig,
    LowRankConfig,
    MergePolicy,
    PackedLinear,
    PreMergedLinear,
    StructureConfig,
)
from factorlm.ops.packed import can_pack
from factorlm.surgery import attach_guides_, densify_, factorize_, guided_layers
from factorlm.testing.models import tiny_model

IDS = torch.arange(12).view(2, 6)
ALWAYS = MergePolicy.always()
FEW = MergePolicy(token_counts=(1, 64), merged=(True, False))
"""Up to 8 tokens merged, beyond by the factors, which a CPU packs."""
STRUCTURES: dict[str, StructureConfig] = {
    "low_rank": LowRankConfig(rank=8),
    "block_shuffle": BlockShuffleConfig(num_blocks=2),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=8),
}
PACKS = can_pack(torch.zeros(2, 2))
"""Whether float32 is packed here."""
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "pre-merge.md"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def structured(
    dtype: torch.dtype = torch.float32, structure: str = "low_rank", **fields: object
) -> PreTrainedModel:
    """Three decoder layers, the first dense; gate and up (32 -> 80) and down (80 -> 32)."""
    torch.manual_seed(0)
    model = tiny_model("llama", **fields)
    factorize_(model, STRUCTURES[structure])
    return model.to(dtype).eval()


def table(*saved: float, first: int = 1) -> LatencyTable:
    """Merged saves ``saved`` ms with ``first``, 2 first, 4 first, ... tokens."""
    return LatencyTable(
        tuple(
            TokenLatency(
                num_tokens=first * 2**power,
                structured_ms=100.0,
                merged_ms=100.0 - ms,
                noise_ms=0.0,
            )
            for power, ms in enumerate(saved)
        )
    )


def cases(model: nn.Module) -> tuple[LayerCase, LayerCase]:
    """Of 32 -> 80 and of 80 -> 32."""
    mlp = model.get_submodule("model.layers.1.mlp")
    return LayerCase.of(mlp.up_proj), LayerCase.of(mlp.down_proj)


# The model -----------------------------------------------------------------------------------


STATED = re.findall(r"^\| (\w+) \| ([\d.e-]+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
TOLERANCES = {getattr(torch, name): float(value) for name, value in STATED}
"""What the page promises is what is held."""


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    assert found.dtype == wanted.dtype
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_a_tolerance_is_stated_for_each_dtype() -> None:
    assert list(TOLERANCES) == [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_layer_computes_the_same(dtype: torch.dtype, structure: str) -> None:
    layer = STRUCTURES[structure].build(256, 1024).to(dtype).eval()
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for policy in (ALWAYS, MergePolicy.never()):
            found = PreMergedLinear(layer, policy).eval()(x)
            assert difference(found, layer(x)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_model_computes_the_same(
    dtype: torch.dtype, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MIN_BYTES", {})
    model = structured(dtype, structure, initializer_range=0.1)
    with torch.no_grad():
        wanted = model(IDS).logits
        report = premerge_(model, ALWAYS)
        assert difference(model(IDS).logits, wanted) <= TOLERANCES[dtype]
        layers = premerged_layers(model)
        assert len(layers) == 6
        assert all(layer.has_copy for layer in layers.values())
        assert report.copy_bytes == 6 * 32 * 80 * dtype.itemsize
        unpremerge_(model)
        pack_(model)
        assert difference(model(IDS).logits, wanted) <= TOLERANCES[dtype]


def test_it_generates_the_same() -> None:
    model = structured(torch.float64)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(IDS, **options)
    premerge_(model, ALWAYS)
    assert torch.equal(model.generate(IDS, **options), wanted)
    assert all(layer.has_copy for layer in premerged_layers(model).values())


def test_unpremerged_nothing_is_left() -> None:
    model = structured()
    modules = list(model.named_modules())
    premerge_(model, ALWAYS)
    names = unpremerge_(model)
    assert list(model.named_modules()) == modules
    assert names == [name for name, module in modules if hasattr(module, "to_dense")]
    assert unpremerge_(model) == []


def test_the_files_are_those_of_the_structured_model(tmp_path: Path) -> None:
    model = structured()
    model.save_pretrained(tmp_path / "plain")
    premerge_(model, ALWAYS)
    with torch.no_grad():
        logits = model(IDS).logits
    model.save_pretrained(tmp_path / "premerged")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert {"config.json", "model.safetensors"} <= set(names)
    assert sorted(path.name for path in (tmp_path / "premerged").iterdir()) == names
    same, *others = filecmp.cmpfiles(tmp_path / "plain", tmp_path / "premerged", names, False)
    assert (same, others) == (names, [[], []])
    opened = load(tmp_path / "premerged")
    torch.testing.assert_close(opened(IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = structured()
    premerge_(model, ALWAYS)
    with torch.no_grad():
        wanted = model(IDS).logits
        other = copy.deepcopy(model)
        for layer in premerged_layers(other).values():
            layer.structured.V.zero_()
        assert not torch.allclose(other(IDS).logits, wanted)
        assert torch.equal(model(IDS).logits, wanted)


def test_a_shared_layer_has_one_copy() -> None:
    layer = LowRankConfig(rank=2).build(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    report = premerge_(model, ALWAYS, memory_budget_bytes=8 * 8 * 4)
    assert isinstance(model["a"][0], PreMergedLinear)
    assert model["a"][0] is model["b"][0]
    assert report.copy_bytes == 8 * 8 * 4
    assert unpremerge_(model) == ["a.0"]
    assert model["a"][0] is model["b"][0] is layer


def test_nothing_to_merge() -> None:
    dense = tiny_model("llama")
    assert premerge_(dense, ALWAYS).rows == ()
    limit = nn.Sequential(DenseConfig().build(4, 4))
    assert premerge_(limit, ALWAYS).rows == ()
    end = "0 of 0 layers keep a merged copy; all copies: 0 bytes"
    assert str(premerge_(limit, ALWAYS)) == end


def test_refusals() -> None:
    model = structured()
    with pytest.raises(ConfigError, match="memory_budget_bytes=-1 must be at least 0"):
        premerge_(model, ALWAYS, memory_budget_bytes=-1)
    premerge_(model, ALWAYS)
    with pytest.raises(ConfigError, match="has merged copies: unpremerge_ first"):
        premerge_(model, ALWAYS)
    with pytest.raises(ConfigError, match="has merged copies: unpremerge_ first"):
        densify_(model)
    with pytest.raises(ConfigError, match="has merged copies: unpremerge_ first"):
        attach_guides_(model)
    assert not guided_layers(model)
    assert len(premerged_layers(model)) == 6
    unpremerge_(model)
    attach_guides_(model)
    with pytest.raises(ConfigError, match="has guides attached: detach_guides_ first"):
        premerge_(model, ALWAYS)
    with pytest.raises(ConfigError, match="the model itself is the layer"):
        premerge_(LowRankConfig(rank=1).build(4, 4), ALWAYS)
    with pytest.raises(ConfigError, match="on the meta device"):
        premerge_(structured().to("meta"), ALWAYS)


@pytest.mark.skipif(not PACKS, reason="needs oneDNN, which packs")
def test_refusals_name_what_is_there_and_what_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``pack_`` alone leaves packed copies; with ``premerge_`` before it, there are merged ones."""
    monkeypatch.setattr(packing, "MIN_BYTES", {})
    model = structured()
    pack_(model)
    for refuses in (premerge_, densify_, attach_guides_):
        with pytest.raises(ConfigError, match="has packed copies: unpack_ first"):
            refuses(model)
    unpack_(model)
    budget = cases(model)[0].copy_bytes
    assert sum(row.merged for row in premerge_(model, ALWAYS, memory_budget_bytes=budget).rows) == 1
    pack_(model)
    with pytest.raises(ConfigError, match="has merged copies: unpremerge_ first"):
        premerge_(model)
    unpremerge_(model)
    assert len(premerge_(model, ALWAYS).rows) == 6


# Which layers --------------------------------------------------------------------------------


def merged_names(model: nn.Module) -> list[str]:
    return [name.removeprefix("model.layers.") for name in premerged_layers(model)]


def test_the_policy_is_that_of_the_table() -> None:
    model = structured()
    up, down = cases(model)
    report = premerge_(model, {up: table(1.0, -1.0, 1.0), down: table(-1.0, -1.0)})
    wanted = [f"{layer}.mlp.{name}_proj" for layer in (1, 2) for name in ("gate", "up")]
    assert merged_names(model) == wanted
    policy = premerged_layers(model)["model.layers.1.mlp.up_proj"].policy
    assert [n for n in range(1, 6) if policy.merges(n)] == [1, 3, 4, 5]
    rows = {row.name: row for row in report.rows}
    assert len(rows) == 6
    assert {row.source for row in report.rows} == {"measured"}
    assert rows["model.layers.1.mlp.down_proj"].reason == "never faster merged"
    assert not rows["model.layers.1.mlp.down_proj"].merged


def test_beyond_what_was_measured_the_formula_decides() -> None:
    """Merged won at all counts that were measured, which says nothing of ten thousand tokens."""
    layer = LowRankConfig(rank=64).build(256, 1024)
    model = nn.Sequential(layer)
    premerge_(model, {LayerCase.of(layer): table(1.0, 1.0, 1.0)})
    assert [n for n in (1, 2, 4, 5, 6, 100, 10_000) if model[0].policy.merges(n)] == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("num_copies", "wanted"),
    [
        (0, []),
        (1, ["1.mlp.down_proj"]),
        (2, ["1.mlp.down_proj", "2.mlp.down_proj"]),
        (3, ["1.mlp.gate_proj", "1.mlp.down_proj", "2.mlp.down_proj"]),
        (6, None),
        (None, None),
    ],
)
def test_the_budget_goes_to_most_time_saved_per_byte(
    num_copies: int | None, wanted: list[str] | None
) -> None:
    """Down saves 4 ms a token, gate and up save 1; they are equally large, and in float64 no
    factors are packed."""
    model = structured(torch.float64)
    up, down = cases(model)
    one = up.copy_bytes
    budget = None if num_copies is None else num_copies * one
    report = premerge_(model, {up: table(1.0), down: table(4.0)}, memory_budget_bytes=budget)
    assert merged_names(model) == (wanted if wanted is not None else _all_names(report))
    assert report.copy_bytes == len(merged_names(model)) * one
    over = [row.reason for row in report.rows if not row.merged]
    assert over == ["over the budget"] * (6 - len(merged_names(model)))
    unpremerge_(model)
    if num_copies:
        premerge_(model, {up: table(1.0), down: table(4.0)}, memory_budget_bytes=budget - 1)
        assert len(merged_names(model)) == num_copies - 1


def _all_names(report: object) -> list[str]:
    return [row.name.removeprefix("model.layers.") for row in report.rows]


def held_bytes(model: nn.Module) -> int:
    """Of all copies there are now. An opaque tensor says how many values it holds."""
    keepers = [m._packed for m in model.modules() if isinstance(m, PackedLinear | PreMergedLinear)]
    keepers += [layer._merged for layer in premerged_layers(model).values()]
    copies = [keeper._copy.kept for keeper in keepers if keeper._copy is not None]
    return sum(tensor.numel() * tensor.element_size() for kept in copies for tensor in kept)


@torch.no_grad()
def run_with_few_and_many(model: PreTrainedModel) -> None:
    """Tokens that take the merged copies, and tokens that take the factors."""
    for count in (1, 64):
        model(torch.full((1, count), 5))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("policy", [ALWAYS, FEW], ids=["always", "few"])
def test_all_copies_are_counted(dtype: torch.dtype, structure: str, policy: MergePolicy) -> None:
    """Packed factors beside the merged copy too, where the policy ever takes them."""
    model = structured(dtype, structure)
    report = premerge_(model, policy)
    run_with_few_and_many(model)
    assert report.copy_bytes == held_bytes(model) > 0
    packs = structure == "low_rank" and policy == FEW and can_pack(torch.zeros(2, 2, dtype=dtype))
    assert report.copy_bytes == 6 * dtype.itemsize * (32 * 80 + packs * 8 * (32 + 80))


def test_the_budget_counts_packed_factors() -> None:
    one = 4 * (32 * 80 + PACKS * 8 * (32 + 80))
    for budget, wanted in ((one - 1, 0), (one, 1), (6 * one - 1, 5), (6 * one, 6)):
        report = premerge_(structured(), FEW, memory_budget_bytes=budget)
        assert sum(row.merged for row in report.rows) == wanted
        assert report.copy_bytes == wanted * one


@pytest.mark.parametrize("half", [20_000, 60_000, 90_000])
def test_the_command_keeps_all_copies_within_half_of_the_free_memory(
    half: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "MIN_BYTES", {})
    monkeypatch.setattr("factorlm.measure.free_memory_bytes", lambda device: 2 * half)
    model = structured()
    for case in cases(model):
        save_table(case, table(*[1.0] * 3, *[-1.0] * 10))
    _keep_copies(model, compiled=False)
    run_with_few_and_many(model)
    assert half / 2 < held_bytes(model) <= half
    assert "pre-merged: " in capsys.readouterr().err


def test_a_small_layer_takes_what_a_large_one_leaves() -> None:
    """The larger saves more in all and less per byte; what does not fit is passed over."""
    large, small = (LowRankConfig(rank=2).build(n, n, dtype=torch.float64) for n in (32, 8))
    tables = {LayerCase.of(large): table(16.0), LayerCase.of(small): table(2.0)}
    for budget, wanted in ((8192 + 511, ["1"]), (8192 + 512, ["0", "1"])):
        model = nn.Sequential(large, small)
        premerge_(model, tables, memory_budget_bytes=budget)
        assert list(premerged_layers(model)) == wanted


def test_a_token_count_weighs_by_what_it_saves_per_token() -> None:
    """3 ms with one token are more than 8 ms with four."""
    model = structured(torch.float64)
    up, down = cases(model)
    tables = {up: table(-1.0, -1.0, 8.0), down: table(3.0, -1.0, -1.0)}
    premerge_(model, tables, memory_budget_bytes=2 * up.copy_bytes)
    assert merged_names(model) == ["1.mlp.down_proj", "2.mlp.down_proj"]


def test_the_cached_table_decides_then_the_formula() -> None:
    model = structured()
    up, down = cases(model)
    save_table(down, table(-1.0, -1.0, -1.0, -1.0))
    report = premerge_(model)
    found = {row.name.rpartition(".")[2]: (row.source, row.merged) for row in report.rows}
    # So small that the overhead of a second matmul decides by the formula.
    assert found == {
        "gate_proj": ("estimated", True),
        "up_proj": ("estimated", True),
        "down_proj": ("measured", False),
    }
    assert "model.layers.1.mlp.up_proj    low_rank 32x80 float32  estimated: merged at" in str(
        report
    )
    assert not table_path(up).exists()


def test_a_damaged_cache_warns_and_the_formula_decides() -> None:
    model = structured()
    _, down = cases(model)
    save_table(down, table(-1.0)).write_text("damaged")
    with pytest.warns(UserWarning, match="is not used"):
        report = premerge_(model)
    assert {row.source for row in report.rows} == {"estimated"}
