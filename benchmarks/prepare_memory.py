"""Peak memory of ``factorlm prepare``, summed over it and all its workers.

python benchmarks/prepare_memory.py 'books/train-*.parquet' --val-source books/validation.parquet
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _publish import publish

from factorlm.data import open_dataset
from factorlm.measure import environment

POLL_SECONDS = 0.05


def proportional_bytes(root: psutil.Process) -> int:
    """Memory of a process tree; a page that several share counts once (PSS)."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--val-source", required=True)
    parser.add_argument("--tokenizer", default="bpe:4096")
    parser.add_argument("--output", type=Path, help="append the result as one line of JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        command = [sys.executable, "-m", "factorlm", "prepare", *args.sources, "-o", str(data)]
        command += ["--val-source", args.val_source, "--tokenizer", args.tokenizer]
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, proportional_bytes(psutil.Process(process.pid)))
            time.sleep(POLL_SECONDS)
        if process.returncode:
            sys.exit(process.returncode)
        splits = open_dataset(data).splits.values()
        result = {
            "benchmark": "prepare_memory",
            "environment": environment(),
            "tokenizer": args.tokenizer,
            "num_text_bytes": sum(split.num_text_bytes for split in splits),
            "num_tokens": sum(split.num_tokens for split in splits),
            "peak_pss_bytes": peak,
            "seconds": round(time.perf_counter() - started, 1),
            "bars": {"peak_pss_bytes": 1_500_000_000},
        }
    publish(result, args.output)


if __name__ == "__main__":
    main()
