"""Wall time and validation loss against nanoGPT's own run, alternating, on the same text.

nanoGPT (github.com/karpathy/nanoGPT) runs as its README says for a CPU, from a clone of yours;
factorlm runs ``recipes/shakespeare_dense.yaml``. Each is a process of its own, timed from start to
exit: imports, training, evaluations and checkpoints included.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt_shakespeare.py --nanogpt nanoGPT --text tinyshakespeare.txt
"""

from __future__ import annotations

import argparse
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _publish import publish

from factorlm.measure import environment
from factorlm.records import EvalRecord, RecordFile

RECIPE = Path(__file__).parent.parent / "recipes" / "shakespeare_dense.yaml"
NANOGPT = [
    "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
    "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4",
    "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
]  # fmt: skip


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    """Wall seconds and standard output of a process."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stdout


def run_nanogpt(clone: Path, folder: Path) -> tuple[float, float]:
    """Seconds, and the last validation loss that it prints (20 random batches)."""
    seconds, output = timed([sys.executable, *NANOGPT, f"--out_dir={folder}"], clone)
    return seconds, float(re.findall(r"val loss ([\d.]+)", output)[-1])


def run_factorlm(data: Path, folder: Path) -> tuple[float, float]:
    """Seconds, and the validation loss over every window of the last 10 %."""
    command = [sys.executable, "-m", "factorlm", "train", str(RECIPE), "--runs-dir", str(folder)]
    seconds, _ = timed([*command, "--name", "run", "--data.path", str(data)], Path.cwd())
    records = RecordFile(folder / "run" / "records.jsonl")
    return seconds, [record.loss for record in records if isinstance(record, EvalRecord)][-1]


def prepare(clone: Path, text: Path, data: Path) -> None:
    """The same text for both; nanoGPT's files are what its own script writes after a download."""
    folder = clone / "data" / "shakespeare_char"
    characters = text.read_text()
    alphabet = {letter: number for number, letter in enumerate(sorted(set(characters)))}
    ids = np.array([alphabet[letter] for letter in characters], dtype=np.uint16)
    cut = int(0.9 * len(ids))
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(alphabet)}))
    command = [sys.executable, "-m", "factorlm", "prepare", str(text), "-o", str(data)]
    timed([*command, "--tokenizer", "bytes", "--val-fraction", "0.1"], Path.cwd())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="append the result as one line of JSON")
    args = parser.parse_args()
    clone, text = args.nanogpt.resolve(), args.text.resolve()
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(clone, text, folder / "data")
        for number in range(args.rounds):
            theirs.append(run_nanogpt(clone, folder / f"nanogpt-{number}"))
            ours.append(run_factorlm(folder / "data", folder / f"factorlm-{number}"))
            print(
                f"round {number + 1}: nanoGPT {theirs[-1][0]:.1f} s, loss {theirs[-1][1]:.4f}; "
                f"factorlm {ours[-1][0]:.1f} s, loss {ours[-1][1]:.4f}",
                flush=True,
            )
    ratios = [o[0] / t[0] for o, t in zip(ours, theirs, strict=True)]
    result = {
        "benchmark": "nanogpt_shakespeare",
        "environment": environment(),
        "nanogpt_seconds": [round(seconds, 2) for seconds, _ in theirs],
        "factorlm_seconds": [round(seconds, 2) for seconds, _ in ours],
        "nanogpt_val_loss": [loss for _, loss in theirs],
        "factorlm_val_loss": [round(loss, 4) for _, loss in ours],
        "wall_time_ratio_median": round(statistics.median(ratios), 4),
        "wall_time_ratio_min": round(min(ratios), 4),
        "wall_time_ratio_max": round(max(ratios), 4),
        "bars": {"wall_time_ratio": 1.1, "factorlm_val_loss": 1.80},
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()
