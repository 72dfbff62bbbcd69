"""Whether a conversion was begun, how far it got, and what of it is still right.

While a conversion runs, a record lists its finished files with their checksums. In a v4jax directory that is
`conversion.json`, whose status becomes "complete"; in a Hugging Face directory it is removed in the end.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from v4jax.checkpoint.layout import Job, PlannedFile
from v4jax.checkpoint.location import Location, write_json, writing
from v4jax.checkpoint.names import section_name, sections
from v4jax.checkpoint.reader import MANIFEST, Checkpoint
from v4jax.checkpoint.tensor_file import UNFINISHED, CheckpointError
from v4jax.checkpoint.transfer import Record, checksum
from v4jax.checkpoint.writer import Progress, prepare_destination


class Conversion:
    """The record of one conversion in its destination.

    Args:
        job: what is converted.
        files: its plan.
        destination: the directory.
    """

    def __init__(self, job: Job, files: Sequence[PlannedFile], destination: Location) -> None:
        self._job, self._planned, self._destination = job, files, destination
        self._place = destination / (MANIFEST if job.to == "v4jax" else UNFINISHED)
        self._identity = _identity(job, files)
        self.files: dict[str, Record] = {}
        """The finished files."""
        self.is_complete = False
        """Whether nothing is left to do."""

    def begin(self, *, resume: bool, keep_finished: bool) -> list[str]:
        """Takes over what an interrupted run finished, or starts in an empty directory.

        Returns:
            Names of finished files that were no longer as they had been written, and so count as missing.

        Raises:
            CheckpointError: the directory holds something else, or belongs to another conversion.
        """
        if keep_finished and self._is_finished():
            return []
        if not resume:
            if self._place.is_file() and (self._read() or {}).get("status") != "complete":
                raise CheckpointError(
                    f"{self._destination}: exists and is not empty, it holds an unfinished conversion; "
                    "go on with --resume, remove it or give another output directory"
                )
            prepare_destination(self._destination)
            return []
        record = self._read()
        if record is None:
            return self._begin_without_record()
        if record.get("identity") != self._identity:
            choices = {key: record.get(key) for key in self._choices()}
            raise CheckpointError(
                f"{self._destination}: cannot be resumed, it was begun with another source or other choices: "
                f"{choices}, now {self._choices()}; repeat those, or remove it and convert again"
            )
        finished = {name: entry for name, entry in record["files"].items() if self._is_planned(name)}
        self.files = self._unharmed(finished)
        self.is_complete = record.get("status") == "complete" and len(self.files) == len(self._planned)
        return sorted(finished.keys() - self.files.keys())

    def _is_finished(self) -> bool:
        """Whether all was written; sets `files` and `is_complete` then. Looks at no checksum."""
        if self._job.to == "v4jax":
            record = self._read() or {}
            self.files = {name: entry for name, entry in record.get("files", {}).items() if self._is_planned(name)}
            is_same = (record.get("identity"), record.get("status")) == (self._identity, "complete")
            self.is_complete = is_same and len(self.files) == len(self._planned)
            self.files = self.files if self.is_complete else {}
        elif not self._place.is_file() and (self._destination / "config.json").is_file():
            self.is_complete = all(_has_header(self._destination / file.name, file) for file in self._planned)
            self.files = {file.name: {"bytes": file.nbytes} for file in self._planned} if self.is_complete else {}
        return self.is_complete

    def _begin_without_record(self) -> list[str]:
        """Nothing was finished, or everything was: a Hugging Face directory loses its record in the end."""
        destination = self._destination
        if self._job.to == "hf" and self._is_finished():
            self.files = {file.name: checksum(destination / file.name) or {} for file in self._planned}
            return []
        started = f"{self._place.name}.partial"  # object stores show no unfinished uploads
        if destination.is_dir() and [entry.name for entry in destination.iterdir()] == [started]:
            with writing(destination):
                (destination / started).unlink()
        prepare_destination(destination)
        return []

    def _is_planned(self, name: str) -> bool:
        return any(file.name == name for file in self._planned)

    def _unharmed(self, finished: Mapping[str, Record]) -> dict[str, Record]:
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda name: checksum(self._destination / name), finished)
            return {
                name: finished[name] for name, record in zip(finished, found, strict=True) if record == finished[name]
            }

    # ---- the record ----------------------------------------------------------------------------------------------
    def _read(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self._place.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self._place}: cannot be read ({error}); remove the directory and convert again"
            ) from None
        files = record.get("files") if isinstance(record, dict) else None
        if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
            raise CheckpointError(
                f"{self._place}: is no record of a conversion; remove the directory and convert again"
            )
        return record

    def _choices(self) -> dict[str, Any]:
        job = self._job
        choices: dict[str, Any] = {"weights": job.weights, "to": job.to}
        if job.to == "hf":
            choices |= {"layout": job.layout, "shard_bytes": job.shard_bytes}
        return choices | ({"base": str(job.base.path)} if job.base else {})

    def add(self, name: str, record: Record) -> None:
        """Notes a finished file."""
        self.files[name] = record
        self.save()

    def save(self, notes: Sequence[str] = (), *, is_complete: bool = False) -> None:
        """Writes the record."""
        files = {file.name: self.files[file.name] for file in self._planned if file.name in self.files}
        tensors = [tensor for file in self._planned for tensor in file.tensors]
        record = {
            "format": self._job.to,
            "version": 1,
            **self._choices(),
            "source": describe_source(self._job.source),
            "identity": self._identity,
            "tensors": len(tensors),
            "bytes": sum(tensor.nbytes for tensor in tensors),
            "files": files,
            "notes": list(notes),
            "status": "complete" if is_complete else "running",
        }
        with writing(self._place):
            write_json(self._place, record)

    def finish(self, notes: Sequence[str]) -> None:
        """Says that everything is written."""
        if self._job.to == "v4jax":
            self.save(notes, is_complete=True)
        else:
            with writing(self._place):
                self._place.unlink(missing_ok=True)


def describe_source(checkpoint: Checkpoint) -> dict[str, object]:
    """What a record says of where the weights come from."""
    root = checkpoint.directory
    files: set[Any] = {info.file for info in checkpoint.inventory.values()}
    return {
        "path": str(checkpoint.path.resolve()),
        "spelling": checkpoint.spelling.value,
        "files": {str(file.relative_to(root)): file.stat().st_size for file in sorted(files)},
        "tensors": len(checkpoint.inventory),
        "bytes": checkpoint.nbytes,
        "ignored": list(checkpoint.ignored),
    }


def _identity(job: Job, files: Sequence[PlannedFile]) -> str:
    """Stands for everything that decides the bytes: the plan, and the files that they are made from."""
    digest = hashlib.sha256(job.weights.encode())
    for file in files:
        digest.update(file.name.encode() + file.header)
    for checkpoint in (job.source, job.base):
        sources: set[Any] = {info.file for info in checkpoint.inventory.values()} if checkpoint else set()
        for file in sorted(sources):
            found = file.stat()
            digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _has_header(place: Location, file: PlannedFile) -> bool:
    if not place.is_file() or place.stat().st_size != file.nbytes:
        return False
    with place.open("rb") as stream:
        return stream.read(len(file.header)) == file.header


class Report:
    """Tells the caller of sections, in order, and of bytes as they are written."""

    def __init__(
        self,
        job: Job,
        files: Sequence[PlannedFile],
        progress: Progress | None,
        on_bytes: Callable[[int, int], None] | None,
    ) -> None:
        import threading

        self._progress, self._on_bytes, self._lock = progress, on_bytes, threading.Lock()
        self._sections = [section_name(section) for section in sections(job.source.config)]
        self._left = dict.fromkeys(self._sections, 0)
        for tensor in (tensor for file in files for tensor in file.tensors):
            if tensor.section in self._left:
                self._left[tensor.section] += 1
        self._told = self._done = 0
        self._total = sum(file.nbytes for file in files)

    def add_bytes(self, count: int) -> None:
        """Some more were written."""
        with self._lock:
            self._done += count
            if self._on_bytes:
                self._on_bytes(self._done, self._total)

    def add_tensor(self, section: str) -> None:
        """A tensor of this section is finished."""
        with self._lock:
            if section in self._left:
                self._left[section] -= 1
            while self._told < len(self._sections) and not self._left[self._sections[self._told]]:
                self._told += 1
                if self._progress:
                    self._progress(self._told, len(self._sections), self._sections[self._told - 1])

    def add_files(self, files: Sequence[PlannedFile]) -> None:
        """These are there already."""
        if files:
            self.add_bytes(sum(file.nbytes for file in files))
        for tensor in (tensor for file in files for tensor in file.tensors):
            self.add_tensor(tensor.section)
