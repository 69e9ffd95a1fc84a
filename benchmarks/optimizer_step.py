"""What an optimizer step costs beside the training step that it ends, alternating in one run.

The share is that of a step of ``--tokens-per-step`` tokens: forward and backward are timed on
``--tokens`` of them and scaled up, since they are proportional to the tokens and the optimizer's
step does not depend on them. AdamW's own step is in the table too: what Muon or Spectron add is
the difference. ``low_rank_guided`` has a guide beside every structured layer, in the passes too,
which merge it once every ``--tokens``.

    python benchmarks/optimizer_step.py --output reports/optimizer_step/records/optimizer_step.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from _publish import publish
from transformers import PreTrainedModel

from factorlm.accounting import guide_flops, training_flops
from factorlm.hf import build_causal_lm
from factorlm.hf.loss import CausalLMLoss
from factorlm.layers import (
    BlockDenseConfig,
    BlockShuffleConfig,
    LowRankConfig,
    StructureConfig,
)
from factorlm.measure import Measurement, environment, has_fast_bf16, measure_latency
from factorlm.optim import GuideSchedule, build_optimizer, guide_optimizer_flops, optimizer_flops
from factorlm.surgery import attach_guides_, guided_layers, set_guides_

STRUCTURES: dict[str, StructureConfig | None] = {
    "dense": None,
    "low_rank": LowRankConfig(),
    "block_shuffle": BlockShuffleConfig(),
    "block_dense": BlockDenseConfig(),
    "low_rank_guided": LowRankConfig(),
}
KINDS = {
    "dense": ("adamw", "muon", "spectron"),
    "low_rank": ("adamw", "muon", "spectron", "lora_muon"),
    "block_shuffle": ("adamw", "muon", "spectron"),
    "block_dense": ("adamw", "muon", "spectron"),
    "low_rank_guided": ("muon",),
}
BAR = 0.05


def measure(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every kind of optimizer of ``KINDS`` on case ``name``."""
    device = torch.device(args.device)
    length = min(args.tokens, 1024)
    model, flops = build(name, args, length)
    loss = CausalLMLoss(model)
    ids = torch.randint(0, model.config.vocab_size, (args.tokens // length, length), device=device)

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bf16(device.type)):
            total = loss(ids, ids)
        total.backward()

    passes()
    # A rate of zero: steps cost the same and the weights stay as they are.
    kinds = KINDS[name]
    optimizers = {kind: build_optimizer(model, kind=kind, learning_rate=0.0) for kind in kinds}
    cases = {"passes": passes} | {kind: made.step for kind, made in optimizers.items()}
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = measure_latency(cases, rounds=args.rounds, min_round_ms=1, synchronize=synchronize)
    scale = args.tokens_per_step / (ids.shape[0] * length)
    return {
        kind: {
            "step_ms": round(found[kind].median_ms, 2),
            "spread_ms": round(found[kind].spread_ms, 2),
            "passes_ms": round(scale * found["passes"].median_ms, 1),
            "share": round(share(found[kind], found["passes"], scale), 5),
            "share_of_flops": round(step_flops(model, kind) / flops, 5),
        }
        for kind in kinds
    }


def build(name: str, args: argparse.Namespace, length: int) -> tuple[PreTrainedModel, int]:
    """The model of case ``name``, and the ``model_flops`` of a step, its guides' included."""
    structure = STRUCTURES[name]
    model = build_causal_lm(
        args.preset,
        structure,
        param_ratio=None if structure is None else 0.32,
        device=torch.device(args.device),
        max_position_embeddings=1024,
    )
    tokens = args.tokens_per_step
    flops = training_flops(model, seq_len=length, num_tokens=tokens).model_flops
    if name.endswith("_guided"):
        flops += guide_flops(
            model, tokens_per_step=tokens, tokens_per_forward=args.tokens
        ).model_flops
        attach_guides_(model)
        set_guides_(guided_layers(model).values(), GuideSchedule(num_steps=2, variant="full"), 1)
    return model, flops


def step_flops(model: PreTrainedModel, kind: str) -> int:
    """Matmul FLOPs of a step of the optimizer, its guides' included."""
    guides = [layer.guide.weight for layer in guided_layers(model).values()]
    own = sum(guide_optimizer_flops(*reversed(weight.shape), kind) for weight in guides)
    return own + optimizer_flops(model, kind)


def share(step: Measurement, passes: Measurement, scale: float) -> float:
    """Of the optimizer in the whole step; the median of the rounds."""
    pairs = zip(step.latencies_ms, passes.latencies_ms, strict=True)
    return statistics.median(own / (own + scale * rest) for own, rest in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="gpt_s", help="width 768, 12 layers")
    parser.add_argument("--tokens", type=int, default=1024, help="timed in a pass")
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=STRUCTURES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="append the result as one line of JSON")
    args = parser.parse_args()
    result = {
        "benchmark": "optimizer_step",
        "environment": environment(torch.device(args.device)),
        "preset": args.preset,
        "tokens_per_step": args.tokens_per_step,
        "bars": {"share": BAR},
        "cases": {name: measure(name, args) for name in args.structures},
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()
