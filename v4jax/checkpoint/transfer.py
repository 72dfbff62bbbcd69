"""Writes planned files: pieces are made by a pool of threads, and written and hashed in order, file beside file.

What is in memory at a time is a fixed number of pieces, whatever the size of the checkpoint.
"""

import collections
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np

from v4jax.checkpoint.content import DEFAULT_RANGE_BYTES
from v4jax.checkpoint.layout import PlannedFile, PlannedTensor, largest_piece
from v4jax.checkpoint.location import Location, appearing_whole, write_all, writing
from v4jax.checkpoint.tensor_file import CheckpointError

_HASH_CHUNK = 1 << 24
_MOST_FILES, _MOST_THREADS = 4, 16

Record = dict[str, Any]
"""`bytes` and `sha256` of a file."""


class Budget(NamedTuple):
    """How memory is shared out."""

    files: int
    """Written at once."""
    threads: int
    """That make pieces."""
    window: int
    """Pieces of one file that wait or are being made."""
    piece: int
    """Bytes of memory per piece."""


def share_memory(files: Sequence[PlannedFile], max_memory: int) -> Budget:
    """The widest way of working whose pieces, with half as much again for what the allocator keeps, fit `max_memory`.

    Raises:
        CheckpointError: not even one piece at a time fits.
    """
    need = largest_piece(list(files))
    cores = os.cpu_count() or 1
    threads, at_once = min(_MOST_THREADS, cores), max(1, min(_MOST_FILES, cores, len(files)))
    while True:
        window = -(-threads // at_once) + 1
        piece = max_memory * 2 // 3 // (at_once * (window + 1))
        if piece >= need:
            return Budget(at_once, threads, window, min(piece, max(need, DEFAULT_RANGE_BYTES)))
        if threads == at_once == 1:
            least = -(-need * (window + 1) * 3 // 2 // 2**20)
            raise CheckpointError(
                f"--max-memory: got {max_memory:,} bytes, need at least {least} MiB for the widest matrix of this model"
            )
        threads, at_once = max(1, threads // 2), max(1, at_once // 2)


class Transfer:
    """Writes files of one conversion.

    Args:
        destination: the directory.
        budget: what `share_memory` found.
        reuse: called with each piece that is written and no longer needed.
        on_bytes: called, from any thread, with the number of bytes just written.
        on_tensor: called, from any thread, with each tensor that is written.
    """

    def __init__(
        self,
        destination: Location,
        budget: Budget,
        reuse: Callable[[np.ndarray], None],
        on_bytes: Callable[[int], None],
        on_tensor: Callable[[PlannedTensor], None],
    ) -> None:
        self._destination, self._budget, self._reuse = destination, budget, reuse
        self._on_bytes, self._on_tensor = on_bytes, on_tensor
        self._stop = threading.Event()

    def write(self, files: Sequence[PlannedFile]) -> Iterator[tuple[PlannedFile, Record]]:
        """Writes all of them, several at once; yields each when it is whole and on the disk.

        Raises:
            CheckpointError: a source cannot be read, holds what cannot be right, or the output cannot be written.
        """
        budget = self._budget
        with ThreadPoolExecutor(budget.files) as writers, ThreadPoolExecutor(budget.threads) as makers:
            running = {writers.submit(self._write_file, file, makers): file for file in files}
            try:
                while running:
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(done), done.result()
            finally:  # after an error, the others end soon
                self._stop.set()
                for future in running:
                    future.cancel()

    def _write_file(self, file: PlannedFile, makers: ThreadPoolExecutor) -> Record:
        place, digest = self._destination / file.name, hashlib.sha256()
        with ThreadPoolExecutor(1) as hasher, writing(place), appearing_whole(place) as stream:

            def put(content: np.ndarray) -> None:
                hashed = hasher.submit(digest.update, content.data)  # while it is written
                write_all(stream, content)
                hashed.result()
                self._on_bytes(len(content))
                self._reuse(content)

            put(np.frombuffer(file.header, np.uint8))
            for content in self._made(file, makers):
                put(content)
        return {"bytes": file.nbytes, "sha256": digest.hexdigest()}

    def _made(self, file: PlannedFile, makers: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """The pieces of a file in order; a few of them are made ahead."""
        waiting: collections.deque[Future[np.ndarray] | Callable[[], np.ndarray] | PlannedTensor] = collections.deque()
        ahead = 0
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(lambda: [item.cancel() for item in waiting if isinstance(item, Future)])
            for item in self._pieces(file):
                if self._stop.is_set():
                    raise CheckpointError("stopped, since another file failed")
                if isinstance(item, PlannedTensor) or item.is_deferred:
                    waiting.append(item if isinstance(item, PlannedTensor) else item.make)
                    continue
                waiting.append(makers.submit(item.make))
                ahead += 1
                while ahead >= self._budget.window:
                    first = waiting.popleft()
                    ahead -= isinstance(first, Future)
                    yield from self._finish(first)
            while waiting:
                yield from self._finish(waiting.popleft())

    def _pieces(self, file: PlannedFile) -> Iterator[Any]:
        for tensor in file.tensors:
            yield from tensor.pieces(self._budget.piece)
            yield tensor

    def _finish(self, item: Any) -> Iterator[np.ndarray]:
        if isinstance(item, PlannedTensor):
            self._on_tensor(item)
        else:
            yield item.result() if isinstance(item, Future) else item()


def checksum(file: Location) -> Record | None:
    """Size and SHA-256 of a file, or None if there is none."""
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        return None
    return {"bytes": size, "sha256": digest.hexdigest()}
