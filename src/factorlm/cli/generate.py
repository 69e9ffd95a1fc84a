"""``factorlm generate``: text from a model, as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from factorlm.cli._model import add_model_arguments, find_run, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from factorlm.inference import Generation

HELP = "generate text with a model, and say how fast"
KEEPS_MEMORY = True
EPILOG = """\
One prompt's text streams as it comes. Several prompts go through the model as one batch; each gives
the greedy text that it gives alone, and the texts are written when all are done. A --stop string
ends a text and is not part of it.

Speeds go to stderr: of the prompt, and of the tokens after the first one, at the median token.
Neither counts what is made first (memory, graph, program) or writing. Given a run, they go into its
records, where factorlm compare finds those of single texts.

examples:
  factorlm generate runs/demo_low_rank --prompt "def main("
  factorlm generate runs/demo_low_rank --prompt "def main(" --stop "\\n\\n" --stop "class "
  factorlm generate runs/demo_low_rank --prompt "def main(" --prompt "class " --greedy
  factorlm generate runs/demo_low_rank --greedy --max-new-tokens 50 --dtype bfloat16
  factorlm generate HuggingFaceTB/SmolLM2-135M --prompt "Once upon a time" --top-k 50
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to go on with (default: begin a new document); give it again for a batch",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        type=_unescape,
        help="end a text before this string; \\n and \\t stand for line break and tab; may be "
        "given again",
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
    parser.add_argument(
        "--no-premerge",
        action="store_true",
        help="keep no copies of weights: neither merged ones of structured layers where they are "
        "faster (by what factorlm tune measured here, else by a formula), nor, on a CPU, packed "
        "ones; together they take at most half of the free memory",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="on a CPU, compile the step of a token first: seconds that long texts win back; the "
        "program holds one more copy of all weights",
    )


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Write the texts to stdout, the speed to stderr and into the run's records."""
    from factorlm.config import check
    from factorlm.hf import model_folder
    from factorlm.inference import Decoder, Sampling, generate_texts, load_text_tokenizer

    sampling = Sampling(
        greedy=args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    check(all(args.stop), "--stop must not be empty")
    prompts = args.prompt or [""]
    model = open_model(args)
    tokenizer = load_text_tokenizer(model_folder(args.model))
    if not args.no_premerge:
        _keep_copies(model, compiled=args.compile)
    alone = len(prompts) == 1
    if alone:
        print(prompts[0], end="", flush=True)
    done = generate_texts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=args.stop,
        on_text=(lambda row, text: print(text, end="", flush=True)) if alone else None,
        decoder=Decoder(model, compiled=args.compile),
    )
    if alone:
        print(flush=True)
    else:
        _write_batch(prompts, done)
    print(_speeds(done), file=sys.stderr)
    _record(args.model, prompts, done)
    return 0


def _keep_copies(model: PreTrainedModel, *, compiled: bool) -> None:
    """Merged ones first, then packed ones (a compiled step has its own), in half of the memory
    that is free."""
    from factorlm.inference import pack_, premerge_
    from factorlm.measure import free_memory_bytes

    budget = free_memory_bytes(model.device) // 2
    merged = premerge_(model, memory_budget_bytes=budget).copy_bytes
    if merged:
        print(f"pre-merged: {merged / 2**20:,.1f} MiB of copies", file=sys.stderr)
    if not compiled:
        packed = pack_(model, memory_budget_bytes=budget - merged)
        if packed:
            print(f"packed: {packed / 2**20:,.1f} MiB of copies", file=sys.stderr)


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _write_batch(prompts: list[str], done: list[Generation]) -> None:
    """Each prompt and its text under a line that says which one it is."""
    for index, (prompt, found) in enumerate(zip(prompts, done, strict=True), start=1):
        print(f"=== {index} of {len(prompts)} ===\n{prompt}{found.text}", flush=True)


def _speeds(done: list[Generation]) -> str:
    """Prefill of all rows together, decoding of each, and what the batch makes of it."""
    prompt_tokens = sum(one.num_prompt_tokens for one in done)
    prefill = done[0].prefill_seconds
    longest = max(done, key=lambda one: one.num_new_tokens)
    lines = [
        f"prefill: {prompt_tokens} prompt tokens in {1000 * prefill:,.1f} ms, "
        f"{prompt_tokens / prefill:,.1f} tokens/s",
        f"decode: {sum(one.num_new_tokens for one in done)} new tokens, "
        f"{longest.tokens_per_second:,.1f} tokens/s",
    ]
    if len(done) > 1:
        later = sum(len(one.decode_ms) for one in done)
        seconds = sum(longest.decode_ms) / 1000
        total = f", {later / seconds:,.1f} in all" if later else ""
        lines[1] += f" in each of {len(done)} texts{total}"
    return "\n".join(lines)


def _record(model: str, prompts: list[str], done: list[Generation]) -> None:
    from factorlm.records import GenerationRecord

    found = find_run(model)
    if found is None:
        return
    for prompt, one in zip(prompts, done, strict=True):
        found.append(
            GenerationRecord(
                prompt=prompt,
                text=one.text,
                num_prompt_tokens=one.num_prompt_tokens,
                num_new_tokens=one.num_new_tokens,
                seconds=one.seconds,
                tokens_per_second=one.tokens_per_second,
                batch_size=len(done),
                prefill_seconds=one.prefill_seconds,
            )
        )
