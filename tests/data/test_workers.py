"""Worker processes: the ids of one process, in order; they end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from factorlm.data.tokenizer import load_tokenizer
from factorlm.data.workers import EncoderPool
from factorlm.errors import DataError, StorageError

ORPHAN = """
import sys, time
from pathlib import Path
from factorlm.data.workers import EncoderPool
with EncoderPool(Path(sys.argv[1]), 2) as pool:
    pool.submit([b"text"]).result()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_are_the_tokenizers_in_order(tokenizer_folders, make_text, num_workers):
    folder = tokenizer_folders["byte-level"]
    tokenizer = load_tokenizer(folder)
    texts = [[make_text(size, seed) for size in (0, 3, 200)] for seed in range(12)]
    with EncoderPool(folder, num_workers) as pool:
        futures = [pool.submit([text.encode("utf-8") for text in batch]) for batch in texts]
        for batch, future in zip(texts, futures, strict=True):
            for text, ids in zip(batch, future.result(), strict=True):
                assert ids.dtype == np.uint32
                assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_failure_is_reported_and_the_worker_lives(tokenizer_folders, num_workers):
    with EncoderPool(tokenizer_folders["byte-level"], num_workers) as pool:
        for _ in range(4):
            with pytest.raises(DataError, match=r"the tokenizer failed: .*invalid start byte"):
                pool.submit([b"\xff"]).result()
        assert len(pool.submit([b"fine"]).result()) == 1


def test_a_killed_worker_is_reported(tokenizer_folders):
    with EncoderPool(tokenizer_folders["byte-level"], 2) as pool:
        pool.submit([b"text"]).result()
        for child in psutil.Process().children():
            child.kill()
        futures = [pool.submit([b"text"]) for _ in range(4)]
        for future in futures:
            with pytest.raises(StorageError, match="ended with code -9"):
                future.result()


def test_workers_end_with_the_pool(tokenizer_folders):
    before = set(psutil.Process().children())
    with EncoderPool(tokenizer_folders["byte-level"], 2):
        assert len(set(psutil.Process().children()) - before) == 2
    assert set(psutil.Process().children()) == before


def test_workers_end_with_a_killed_parent(tokenizer_folders):
    command = [sys.executable, "-c", ORPHAN, str(tokenizer_folders["byte-level"])]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def _is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
