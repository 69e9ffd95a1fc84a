"""Encode text in several processes, with results in the order that was asked for.

A worker is ``python -m factorlm.data.workers FOLDER`` and talks over its standard streams. So it
needs no guard around the caller's main module, imports nothing but the tokenizer, and ends by
itself when the process that started it ends in any way (its input closes).
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from factorlm.data.tokenizer import TextTokenizer, load_tokenizer
from factorlm.errors import DataError, StorageError

Encode = Callable[[Sequence[bytes]], list[np.ndarray]]


class EncoderPool(contextlib.AbstractContextManager["EncoderPool"]):
    """Encodes lists of texts with ``num_workers`` processes; one means in this process."""

    def __init__(self, folder: Path, num_workers: int) -> None:
        """``folder`` is the tokenizer's."""
        self._stack = contextlib.ExitStack()
        self._idle: queue.SimpleQueue[Encode] = queue.SimpleQueue()
        if num_workers == 1:
            self._idle.put(_local_encoder(load_tokenizer(folder)))
        else:
            for _ in range(num_workers):
                self._idle.put(self._stack.enter_context(_Worker(folder)).encode)
        self._threads = self._stack.enter_context(ThreadPoolExecutor(num_workers))

    def submit(self, texts: Sequence[bytes]) -> Future[list[np.ndarray]]:
        """Encode UTF-8 ``texts``: a future of one uint32 array of ids for each."""
        return self._threads.submit(self._encode, texts)

    def _encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encode = self._idle.get()
        try:
            return encode(texts)
        finally:
            self._idle.put(encode)

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._stack.close()


class _Worker(contextlib.AbstractContextManager["_Worker"]):
    """One process that encodes."""

    def __init__(self, folder: Path) -> None:
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "factorlm.data.workers", str(folder.resolve())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _write_frame(self._process.stdin, texts)
            parts = _read_frame(self._process.stdout)
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            raise StorageError(
                f"a tokenizing process ended with code {code}; -9 means that it was killed, as the "
                "system does when memory runs out"
            ) from None
        if len(parts) != len(texts):
            raise DataError(parts[-1].decode("utf-8"))
        return [np.frombuffer(part, dtype="<u4") for part in parts]

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _local_encoder(tokenizer: TextTokenizer) -> Encode:
    def encode(texts: Sequence[bytes]) -> list[np.ndarray]:
        try:
            return [tokenizer.encode_array(text.decode("utf-8")) for text in texts]
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"the tokenizer failed: {error}") from error

    return encode


def _write_frame(stream: IO[bytes], parts: Sequence[bytes]) -> None:
    """Number of parts, length of each, then the parts; integers of 8 bytes, little-endian."""
    sizes = np.array([len(parts), *map(len, parts)], dtype="<u8")
    stream.write(sizes.tobytes() + b"".join(parts))
    stream.flush()


def _read_frame(stream: IO[bytes]) -> list[bytes]:
    count = int.from_bytes(_read_exactly(stream, 8), "little")
    sizes = np.frombuffer(_read_exactly(stream, 8 * count), dtype="<u8")
    return [_read_exactly(stream, int(size)) for size in sizes]


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


def main(folder: str) -> None:
    """Answer frames of texts with frames of ids until the input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    encode = _local_encoder(load_tokenizer(folder))
    while True:
        try:
            texts = _read_frame(source)
        except EOFError:
            return
        try:
            parts = [ids.astype("<u4").tobytes() for ids in encode(texts)]
        except DataError as error:
            parts = [b""] * len(texts) + [str(error).encode("utf-8")]
        _write_frame(target, parts)


if __name__ == "__main__":
    main(sys.argv[1])
