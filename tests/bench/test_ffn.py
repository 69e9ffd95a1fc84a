"""Benchmarks of a whole FFN: what is timed, what it is split into, what is promised of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.bench.test_linear import SMALL, settings_of, timings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from factorlm.bench import BenchOptions
from factorlm.bench.ffn import (
    ACTIVATION,
    BIASES,
    FFN,
    GATE,
    GatedFFN,
    activation_step,
    benchmark_ffn,
    build_ffns,
    ffn_bars,
    ffn_matmuls,
    swiglu,
)
from factorlm.errors import NumericError

LOW_RANK = SMALL.replace(structures=("low_rank",))
MATMULS = {"dense, bare matmuls", "low_rank, bare matmuls"}


def test_an_ffn_is_split_into_its_parts() -> None:
    forward, both = benchmark_ffn(SMALL)
    whole = {"dense", "low_rank", "block_shuffle", "block_dense"}
    assert set(forward.cases) == whole | MATMULS | {ACTIVATION}
    assert set(both.cases) == whole | MATMULS | {ACTIVATION, BIASES}
    # up and down have 16 x 64 weights each, at rank 16: 0.8 of a dense linear's speed
    assert both.cases["low_rank"]["ideal_speedup"] == pytest.approx(16 * 64 / (16 * 80))


def test_a_gated_ffn_is_split_into_its_parts() -> None:
    records = list(benchmark_ffn(LOW_RANK.replace(gated=True)))
    for record in records:
        assert set(record.cases) == {"dense", "low_rank", GATE} | MATMULS
        assert record.settings["activation"] == "SwiGLU"


def test_the_compiled_form_is_timed_beside_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = LOW_RANK.replace(compiled=True, passes=("forward+backward",))
    (record,) = benchmark_ffn(options)
    assert {"dense, compiled", "low_rank, compiled"} < set(record.cases)
    ideals = {name: case["ideal_speedup"] for name, case in record.cases.items()}
    assert ideals["low_rank, compiled"] == ideals["low_rank"]


def test_a_wrong_compiled_form_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def __init__(self, model: nn.Module, **options: object) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 1.01 * self.model(x)
            return y

    monkeypatch.setattr(torch, "compile", Wrong)
    with pytest.raises(NumericError, match=r"is off by 0\.01"):
        list(benchmark_ffn(LOW_RANK.replace(compiled=True)))


@pytest.mark.parametrize("gated", [False, True])
def test_the_matmuls_alone_are_those_of_the_ffn(gated: bool) -> None:
    setting, _ = settings_of((16, 64))
    models = build_ffns(setting, BenchOptions().configs(64, 16), gated=gated)
    x, wide = torch.randn(5, 16, requires_grad=True), torch.randn(5, 64)
    for model in models.values():
        with FlopCounterMode(display=False) as whole:
            model(x).backward(x.detach())
        with FlopCounterMode(display=False) as alone:
            ffn_matmuls(model, x, x, wide, "forward+backward")()
        assert alone.get_total_flops() == whole.get_total_flops() > 0


def test_an_activation_leaves_gradients_of_its_own_pass() -> None:
    up, gate, slope = torch.randn(3, 4, 5)
    seen: list[Tensor] = []

    def spied(*leaves: Tensor) -> Tensor:
        seen[:] = leaves
        return swiglu(*leaves)

    run = activation_step(spied, [up, gate], slope, "forward+backward")
    run()
    run()
    torch.testing.assert_close(seen[0].grad, slope * nn.functional.silu(gate))
    assert seen[1].grad is not None
    assert not activation_step(swiglu, seen, slope, "forward")().requires_grad  # type: ignore[attr-defined]


def test_the_ffns_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, Starcoder2Config
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

    x = torch.randn(3, 8)
    config = Starcoder2Config(hidden_size=8, intermediate_size=32, hidden_act="gelu")
    plain = Starcoder2MLP(config).eval()
    torch.testing.assert_close(FFN(plain.c_fc, plain.c_proj)(x), plain(x))
    gated = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=32, num_attention_heads=2))
    mine = GatedFFN(gated.up_proj, gated.gate_proj, gated.down_proj)
    torch.testing.assert_close(mine(x), gated(x))


def test_bar_of_an_ffn_pays_the_activation_in_full() -> None:
    """Dense 100 ms, 4 of them GELU: at 3.2 times fewer FLOPs 96/3.2 + 4 = 34 ms are possible."""
    flops = {"dense": 3.2, "low_rank": 1.0}
    times = timings({"dense": 100.0, "low_rank": 40.0, ACTIVATION: 4.0})
    both, forward = settings_of((2048, 8192))
    assert [(bar.value, bar.limit) for bar in ffn_bars(flops, both, times)] == [
        (pytest.approx(34 / 40), 0.93),
        (pytest.approx(2.5), 2.9),
    ]
    assert ffn_bars(flops, forward, times) == []


def test_bars_of_a_gpu_are_for_large_forward_passes_in_bf16() -> None:
    flops = {"dense": 3.2, "low_rank": 1.0, "block_shuffle": 1.0, "block_dense": 1.0}
    times = timings(
        {"dense": 30.0, "low_rank": 10.0, "block_shuffle": 12.0, "block_dense": 9.0, ACTIVATION: 1}
    )
    options = BenchOptions(
        shapes=((5120, 20480),),
        num_tokens=(30_000,),
        dtypes=("bf16",),
        passes=("forward",),
        device="cuda",
    )

    def bars(**changes: object) -> list[tuple[str, float, float, bool]]:
        (setting,) = options.replace(**changes).linear_settings()
        found = ffn_bars(flops, setting, times)
        return [(bar.name, bar.value, bar.limit, bar.at_most) for bar in found]

    assert bars() == [
        ("dense / low_rank, forward", pytest.approx(3.0), 2.9, False),
        ("dense / block_shuffle, forward", pytest.approx(2.5), 2.6, False),
    ]
    assert bars(device="cpu") == bars(dtypes=("fp32",)) == []
    assert bars(num_tokens=(16_384,)) == bars(shapes=((4096, 16384),)) == []
    flops["low_rank"] = 1.6  # twice the share
    assert [name for name, *_ in bars()] == ["dense / block_shuffle, forward"]
