"""A guided layer: its start, its two forms, its limits, its skipped passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from factorlm.errors import ConfigError
from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    SelfGuidedLinear,
    StructureConfig,
    saved_name,
)
from factorlm.layers.self_guided import GuideForm, merging_pays

STRUCTURES = {
    "low_rank": LowRankConfig(rank=3),
    "block_shuffle": BlockShuffleConfig(num_blocks=2),
    "block_shuffle, no output shuffle": BlockShuffleConfig(num_blocks=2, output_shuffle=False),
    "block_dense": BlockDenseConfig(num_blocks=2, rank=4),
}
SIZES = (6, 10)


def guided(
    config: StructureConfig, form: GuideForm = "auto", dtype: torch.dtype = torch.float64
) -> SelfGuidedLinear:
    """A layer whose guide has moved away from the structured map."""
    torch.manual_seed(0)
    layer = SelfGuidedLinear(config.build(*SIZES, dtype=dtype), form=form)
    with torch.no_grad():
        layer.guide.weight += 0.1 * torch.randn_like(layer.guide.weight)
        layer.structured.bias.normal_()
    return layer


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and the gradients of everything, of one loss that no symmetry hides."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found | {"x": x.grad, "y": y.detach()}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_guide_starts_equal_to_the_structured_map(name: str) -> None:
    layer = SelfGuidedLinear(STRUCTURES[name].build(*SIZES, dtype=torch.float64))
    x = torch.randn(5, SIZES[0], dtype=torch.float64)
    wanted = layer.structured(x)
    for alpha in (1.0, 0.3, 0.0):
        layer.set_alpha(alpha)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.25])
def test_merged_equals_two_paths_forward_and_backward(name: str, alpha: float) -> None:
    x = torch.randn(7, SIZES[0], dtype=torch.float64)
    results = []
    for form in ("merged", "two_path"):
        layer = guided(STRUCTURES[name], form)
        layer.set_alpha(alpha)
        results.append(gradients(layer, x))
    merged, two_path = results
    assert merged.keys() == two_path.keys()
    assert {"guide.weight", "structured.bias", "x", "y"} < merged.keys()
    for key, wanted in two_path.items():
        torch.testing.assert_close(merged[key], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["merged", "two_path"])
def test_the_formula(form: GuideForm) -> None:
    """o = α W x + (1 - α) S x + b."""
    layer = guided(STRUCTURES["block_shuffle"], form)
    layer.set_alpha(0.25)
    x = torch.randn(3, 2, SIZES[0], dtype=torch.float64)
    weight = 0.25 * layer.guide.weight + 0.75 * layer.structured.to_dense()
    torch.testing.assert_close(layer(x), linear(x, weight, layer.bias))


@pytest.mark.parametrize("form", ["merged", "two_path"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_any_shape_of_tokens(form: GuideForm, shape: tuple[int, ...]) -> None:
    """The guide's own output is never a view, which FSDP2 cannot hook safely."""
    layer = guided(STRUCTURES["low_rank"], form)
    layer.set_alpha(0.25)
    bases = []
    layer.guide.register_forward_hook(lambda guide, inputs, y: bases.append(y._base))
    x = torch.randn(*shape, SIZES[0], dtype=torch.float64)
    weight = 0.25 * layer.guide.weight + 0.75 * layer.structured.to_dense()
    torch.testing.assert_close(layer(x), linear(x, weight, layer.bias))
    assert bases == [None]


@pytest.mark.parametrize("form", ["merged", "two_path"])
def test_limits_are_the_dense_and_the_structured_layer(form: GuideForm) -> None:
    layer = guided(STRUCTURES["low_rank"], form)
    x = torch.randn(4, SIZES[0], dtype=torch.float64)
    layer.set_alpha(1.0)
    torch.testing.assert_close(layer(x), linear(x, layer.guide.weight, layer.bias))
    layer.set_alpha(0.0)
    torch.testing.assert_close(layer(x), layer.structured(x))


def test_a_skipped_pass_is_the_structured_layer_alone_in_training_only() -> None:
    layer = guided(STRUCTURES["low_rank"])
    x = torch.randn(4, SIZES[0], dtype=torch.float64)
    layer.set_alpha(0.5)
    mixed = layer(x)
    layer.set_alpha(0.5, skipped=True)
    found = gradients(layer, x)
    assert torch.equal(found["y"], layer.structured(x))
    assert "guide.weight" not in found
    layer.eval()
    assert torch.equal(layer(x), mixed)


def test_merging_pays_from_the_tokens_on_that_the_formula_says() -> None:
    """Below N = I O / (I + O) the dense weight costs more than the tokens."""
    sizes = (768, 3072)
    config = LowRankConfig(rank=192)
    breakeven = 768 * 3072 / (768 + 3072)
    assert not merging_pays(config, *sizes, int(breakeven))
    assert merging_pays(config, *sizes, int(breakeven) + 1)
    blocks = BlockDenseConfig(num_blocks=2, rank=256)
    breakeven = 768 * 3072 / (768 + 2 * 3072)
    assert not merging_pays(blocks, *sizes, int(breakeven))
    assert merging_pays(blocks, *sizes, int(breakeven) + 1)


@pytest.mark.parametrize(("num_tokens", "merges"), [(3, False), (4, True)])
def test_auto_takes_the_form_with_fewer_flops(num_tokens: int, merges: bool) -> None:
    """6 * 10 / 16 = 3.75 tokens."""
    layer = guided(LowRankConfig(rank=3))
    calls = []
    layer.structured.register_forward_hook(lambda *_: calls.append("structured"))
    layer(torch.randn(num_tokens, 6, dtype=torch.float64))
    assert calls == ([] if merges else ["structured"])


@pytest.mark.parametrize("form", ["merged", "two_path"])
def test_bf16_autocast(form: GuideForm) -> None:
    layer = guided(STRUCTURES["block_dense"], form, torch.float32)
    layer.set_alpha(0.4)
    x = torch.randn(64, SIZES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.03)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())


def test_compiled_once_for_all_alphas() -> None:
    """One graph with the guide, one without, however α moves."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layer = guided(STRUCTURES["low_rank"], dtype=torch.float32)
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    x = torch.randn(8, SIZES[0])
    for step in range(6):
        layer.set_alpha(1 - step / 6, skipped=step % 2 == 1)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 2


def test_meta_then_start() -> None:
    layer = SelfGuidedLinear(LowRankConfig(rank=3).build(*SIZES, device="meta"))
    assert layer.guide.weight.is_meta
    layer.to_empty(device="cpu")
    layer.structured.reset_parameters()
    layer.start_(layer.structured)
    torch.testing.assert_close(layer.guide.weight, layer.structured.to_dense())
    assert layer.alpha == 1


def test_refusals_name_field_value_and_rule() -> None:
    structured = LowRankConfig(rank=3).build(*SIZES)
    with pytest.raises(ConfigError, match=r"form='merge' must be one of"):
        SelfGuidedLinear(structured, form="merge")
    with pytest.raises(ConfigError, match=r"alpha=1.5 must lie in \[0, 1\]"):
        SelfGuidedLinear(structured).set_alpha(1.5)


def test_saved_name() -> None:
    assert saved_name("model.layers.1.mlp.c_fc.structured.V") == "model.layers.1.mlp.c_fc.V"
    assert saved_name("_orig_mod.a.guide.weight") == "a.guide.weight"
