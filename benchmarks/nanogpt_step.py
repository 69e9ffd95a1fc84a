"""A dense training step of ours against nanoGPT's model and step, alternating in one process.

Width 256, 6 layers, context 256: nanoGPT's model with its own optimizer, and our dense GPT (RoPE in
place of learned positions) with ours; each step is forward, backward, clipping and AdamW on the
same tokens. Bars: in float32 at most 1.03x its time; with bf16 autocast at most 0.60x.

Ours has nanoGPT's weights. Before anything is timed, loss and gradients of both are compared, with
positions left out: its embedding of them zeroed and our rotations stopped.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt_step.py --nanogpt nanoGPT --output reports/speed/records/nanogpt.jsonl
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorlm.bench import Bar, BenchmarkCase, BenchOptions, measure_cases
from factorlm.bench.cases import require_close
from factorlm.bench.model import ModelShape, random_ids, training_step
from factorlm.bench.model_truth import STEP_TOLERANCES, loss_backward
from factorlm.errors import ConfigError, FactorlmError
from factorlm.measure import has_fast_bf16
from factorlm.records import BenchmarkRecord, RecordFile
from factorlm.report.benchmarks import bar_line, benchmark_table, benchmark_title

SHAPE = ModelShape(width=256, num_layers=6, vocab_size=4096, context_length=256)
LIMITS = {"fp32": 1.03, "bf16": 0.60}
NAMES = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}
"""Of a block's modules: nanoGPT's and ours."""


def build_nanogpt(folder: Path) -> nn.Module:
    """nanoGPT's model, from a clone of it. Raises ``ConfigError`` where there is none."""
    path = folder / "model.py"
    if not path.is_file():
        raise ConfigError(f"--nanogpt {folder}: no clone of nanoGPT, which has a model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    config = module.GPTConfig(
        block_size=SHAPE.context_length,
        vocab_size=SHAPE.vocab_size,
        n_layer=SHAPE.num_layers,
        n_head=SHAPE.width // 64,
        n_embd=SHAPE.width,
        dropout=0.0,
        bias=True,
    )
    model: nn.Module = module.GPT(config)
    return model


def in_our_names(theirs: nn.Module, value: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """``value`` of nanoGPT's parameters under the names of ours; not of its positions."""
    found = {"model.embed_tokens.weight": value(theirs.get_parameter("transformer.wte.weight"))}
    for kind in ("weight", "bias"):
        for index in range(SHAPE.num_layers):
            block = theirs.get_submodule(f"transformer.h.{index}")
            place = f"model.layers.{index}"
            for name, ours in NAMES.items():
                found[f"{place}.{ours}.{kind}"] = value(block.get_parameter(f"{name}.{kind}"))
            parts = value(block.get_parameter(f"attn.c_attn.{kind}")).chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                found[f"{place}.self_attn.{letter}_proj.{kind}"] = part
        found[f"model.norm.{kind}"] = value(theirs.get_parameter(f"transformer.ln_f.{kind}"))
    return found


def twin_of(theirs: nn.Module) -> PreTrainedModel:
    """Our dense model with the weights of nanoGPT's. Raises ``ConfigError`` where one has more
    parameters than the other, positions aside."""
    ours = SHAPE.build(None, BenchOptions())
    weights = in_our_names(theirs, lambda parameter: parameter.detach())
    own = dict(ours.named_parameters())
    missing = sorted(own.keys() ^ weights.keys())
    if missing:
        raise ConfigError(f"parameters that only one of the models has: {', '.join(missing)}")
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    return ours


def check_same(theirs: nn.Module, ours: PreTrainedModel, dtypes: list[str]) -> None:
    """Without positions both give the same loss and gradients. Raises ``NumericError``."""
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    nn.init.zeros_(theirs.get_parameter("transformer.wpe.weight"))
    ours.get_buffer("model.rotary_emb.inv_freq").zero_()
    ids = random_ids(ours, 2, SHAPE)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    _, loss = theirs(inputs, labels)
    (loss * labels.numel()).backward()
    wanted = in_our_names(theirs, _gradient)
    for dtype in dtypes:
        found = loss_backward(ours, inputs, labels, dtype)
        error = float((found / labels.numel() - loss.detach()).abs() / loss.detach())
        require_close(f"loss in {dtype}", error, STEP_TOLERANCES[dtype])
        error = relative_error({name: _gradient(p) for name, p in ours.named_parameters()}, wanted)
        require_close(f"gradient in {dtype}", error, STEP_TOLERANCES[dtype])
        ours.zero_grad(set_to_none=True)


def relative_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Of all tensors as one vector: those of keys' biases, which no loss depends on, are 0."""
    mine, truth = (torch.cat([v[name].flatten() for name in wanted]) for v in (found, wanted))
    return float(torch.linalg.vector_norm(mine - truth) / torch.linalg.vector_norm(truth))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def nanogpt_step(model: Any, ids: Tensor) -> Callable[[], object]:
    """nanoGPT's model and optimizer, in float32, as its train.py steps them; ids (B, T + 1)."""
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")

    def run() -> None:
        _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure(args: argparse.Namespace) -> BenchmarkRecord:
    dtypes = [name for name in LIMITS if name == "fp32" or has_fast_bf16("cpu")]
    theirs = build_nanogpt(args.nanogpt)
    ours = twin_of(theirs)
    check_same(theirs, ours, dtypes)
    ids = random_ids(ours, args.rows, SHAPE)  # those of ``training_step``
    cases = {"nanoGPT fp32": BenchmarkCase(run=nanogpt_step(theirs, ids))}
    for dtype in dtypes:
        step = training_step(copy.deepcopy(ours), args.rows, SHAPE, dtype)
        cases[f"factorlm {dtype}"] = BenchmarkCase(run=step)
    return measure_cases(
        "nanogpt_step",
        SHAPE.to_dict() | {"num_tokens": args.rows * SHAPE.context_length},
        cases,
        device=torch.device("cpu"),
        rounds=args.rounds,
        baseline="nanoGPT fp32",
        min_round_ms=1.0,
        bars=lambda times: [
            Bar(
                name=f"factorlm {dtype} / nanoGPT fp32",
                value=times.ratio(f"factorlm {dtype}", "nanoGPT fp32"),
                limit=LIMITS[dtype],
            )
            for dtype in dtypes
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--rows", type=int, default=16, help="sequences a step (default: 16)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="append the record to it")
    args = parser.parse_args()
    try:
        record = measure(args)
    except FactorlmError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print(benchmark_title(record))
    print(benchmark_table(record).plain())
    for bar in record.bars:
        print(bar_line(bar))
    if args.output is not None:
        RecordFile(args.output).append(record)


if __name__ == "__main__":
    main()
