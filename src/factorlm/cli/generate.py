"""``factorlm generate``: text from a model, as it comes."""

from __future__ import annotations

import argparse
import sys

from factorlm.cli._model import add_model_arguments, find_run, open_model

HELP = "generate text with a model, and say how fast"
EPILOG = """\
Tokens per second are those at the median token, after a warm-up and without the prompt. Given a
run, they go into its records, where factorlm compare finds them.

examples:
  factorlm generate runs/demo_low_rank --prompt "def main("
  factorlm generate runs/demo_low_rank --greedy --max-new-tokens 50 --dtype bfloat16
  factorlm generate HuggingFaceTB/SmolLM2-135M --prompt "Once upon a time" --top-k 50
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", default="", help="text to go on with (default: begin a new document)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="at most (default: 200, or as many as the model has positions for)",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="under 1: likelier text (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="choose among the K most likely (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="choose among the most likely that hold probability P (default: 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choices (default: 0)")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Stream the text to stdout, the speed to stderr and into the run's records."""
    from factorlm.hf import model_folder
    from factorlm.inference import Sampling, generate_text, load_text_tokenizer
    from factorlm.records import GenerationRecord

    sampling = Sampling(
        greedy=args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    model = open_model(args)
    tokenizer = load_text_tokenizer(model_folder(args.model))
    print(args.prompt, end="", flush=True)
    done = generate_text(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        on_text=lambda text: print(text, end="", flush=True),
    )
    print(flush=True)
    print(
        f"{done.num_new_tokens} tokens, {done.tokens_per_second:,.1f} tokens/s "
        f"(prompt of {done.num_prompt_tokens} tokens: {1000 * done.prefill_seconds:,.1f} ms)",
        file=sys.stderr,
    )
    found = find_run(args.model)
    if found is not None:
        found.append(
            GenerationRecord(
                prompt=args.prompt,
                text=done.text,
                num_prompt_tokens=done.num_prompt_tokens,
                num_new_tokens=done.num_new_tokens,
                seconds=done.seconds,
                tokens_per_second=done.tokens_per_second,
            )
        )
    return 0
