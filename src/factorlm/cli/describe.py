"""``factorlm describe``: what a recipe builds and costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from factorlm.train.describe import Description

HELP = "count a recipe's parameters, FLOPs and memory without building it"
EPILOG = """\
examples:
  factorlm describe recipes/papers/xl_low_rank_32.yaml
  factorlm describe recipes/papers/m_dense.yaml --json
  factorlm describe recipes/demo_dense.yaml --structure '{structure: low_rank, param_ratio: 0.5}'
"""
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("recipe", help="a YAML recipe; --section.key value changes its fields")
    parser.add_argument("--json", action="store_true", help="one JSON object, units in its keys")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Print the description of ``args.recipe`` with the overrides ``extra``."""
    from rich.console import Console

    from factorlm.train.describe import describe
    from factorlm.train.recipe import load_recipe

    description = describe(load_recipe(args.recipe, extra))
    if args.json:
        import json

        print(json.dumps(description.to_dict(), indent=2))
    else:
        print_description(description, Console())
    return 0


def print_description(description: Description, console: Console) -> None:
    """The description as tables."""
    config = description.config
    console.print(f"[bold]{config.name}[/bold]: {description.architecture}", highlight=False)
    for table in (_costs(description), _parts(description), _memory(description)):
        console.print(table)
    if description.swaps is not None:
        console.print(_swaps(description))


def _costs(description: Description) -> Table:
    config, params, training = description.config, description.params, description.training
    plan = description.plan
    guide_steps = 0 if plan.guide is None else plan.guide.num_steps
    table = _table("run", "")
    rows = {
        "parameters": f"{params.total:,}",
        "  without biases and norms": f"{params.weights:,}",
        "  without embedding and head": f"{params.non_embedding:,}",
        "  of the FFN": f"{params.ffn:,}",
        "forward FLOPs per token": f"{description.forward.total:,}",
        "training FLOPs (the papers' convention)": f"{training.model_flops:.4g}",
        "training FLOPs (executed)": f"{training.executed_flops:.4g}",
        "steps": f"{plan.num_steps:,}",
        "  with a guide": "none fits" if description.guide_left_out else _number(guide_steps),
        "  on tokens seen before": _number(plan.num_replayed_steps),
        "tokens per step": f"{config.tokens_per_step:,}",
        "tokens": f"{description.num_tokens:,}",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _parts(description: Description) -> Table:
    """Parameters and forward FLOPs side by side; attention has two kinds of FLOPs."""
    params, flops = description.params, description.forward
    table = _table("part", "parameters", "forward FLOPs per token")
    rows = (
        ("embedding", params.embedding, 0),
        ("attention projections", params.attention, flops.attention_projections),
        ("attention scores", 0, flops.attention_scores),
        ("FFN", params.ffn, flops.ffn),
        ("head", params.head, flops.head),
        ("norms", params.norm, 0),
        ("biases", params.bias, 0),
        ("other", params.other, flops.other),
    )
    for name, count, cost in rows:
        if count or cost:
            table.add_row(name, _number(count), _number(cost))
    return table


def _memory(description: Description) -> Table:
    memory = description.memory
    sequences = f"{description.micro_batch} sequences a pass"
    table = _table(f"memory of a step ({sequences}, {description.precision}, unsharded)", "")
    for name, size in {
        "weights": memory.weights_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer moments": memory.optimizer_bytes,
        "autocast copies": memory.autocast_bytes,
        "activations (estimate)": memory.activations_bytes,
        "loss": memory.loss_bytes,
        "sum": memory.step_bytes,
        "KV cache per token, in generation": memory.kv_cache_bytes_per_token,
    }.items():
        table.add_row(name, _bytes(size))
    return table


def _swaps(description: Description) -> Table:
    from factorlm.train.describe import group_swaps

    report = description.swaps
    assert report is not None
    table = _table("swapped layers", "in x out", "before", "after", "share")
    for group in group_swaps(report):
        row = group.row
        table.add_row(
            f"{group.num_layers} x {'.'.join(row.name.split('.')[-2:])} -> {row.after_kind}",
            f"{row.in_features}x{row.out_features}",
            f"{row.before_params:,}",
            f"{row.after_params:,}",
            f"{row.param_ratio:.2%}",
        )
    before, after = f"{report.before_params:,}", f"{report.after_params:,}"
    table.add_row(f"all {len(report.rows)}", "", before, after, f"{report.param_ratio:.2%}")
    for site in report.untouched:
        table.add_row(f"not touched: {site.name}", "experts", f"{site.num_params:,}", "", "")
    return table


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(first, show_header=True, title_justify="left")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _number(value: int) -> str:
    return f"{value:,}" if value else ""


def _bytes(size: int) -> str:
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.4g} {units[0]}"
