"""Where checkpoints lie: local paths, and URLs of object stores (`gs://`, `s3://`, …) through fsspec.

`locate` gives a `pathlib.Path` for a local path and a `RemotePath`, with the few methods of it that checkpoints need,
for a URL. Everything else in this package takes either.
"""

import contextlib
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from v4jax.checkpoint.tensor_file import CheckpointError, parse_json

_REUSED = 1 << 20
"""Bytes from which on buffers are worth keeping."""

_LOCAL = ("file", "local")
_EXTRAS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}


class _Stat(NamedTuple):
    st_size: int
    st_mtime_ns: int


class RemotePath:
    """An object or a folder of objects behind a URL; what `Path` has under the same names does the same.

    Args:
        url: with its scheme, such as `gs://bucket/model`; any scheme that fsspec knows.

    Raises:
        CheckpointError: fsspec or the package for this scheme is not installed.
    """

    def __init__(self, url: str) -> None:
        scheme, _, path = url.partition("://")
        self._scheme, self._path = scheme, PurePosixPath(path)
        if not path.strip("/"):
            raise CheckpointError(f"{url}: names no folder; give a URL such as gs://bucket/model")
        try:
            import fsspec

            self._fs: Any = fsspec.filesystem(scheme)
        except ImportError as error:
            package = _EXTRAS.get(scheme) or error.name
            if package is None:
                raise CheckpointError(f"{url}: fsspec cannot open it ({error}); install what it names") from None
            wanted = "'v4jax[remote]'" if package in ("fsspec", "gcsfs") else package
            raise CheckpointError(f"{url}: needs {package}, not installed; pip install {wanted}") from None
        except ValueError as error:
            raise CheckpointError(f"{url}: {error}; give a local path or a URL such as gs://bucket/model") from None

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "RemotePath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: "str | PurePosixPath") -> "RemotePath":
        return self._at(self._path / name)

    def _at(self, path: PurePosixPath) -> "RemotePath":
        other = object.__new__(RemotePath)
        other._scheme, other._path, other._fs = self._scheme, path, self._fs
        return other

    @property
    def name(self) -> str:
        """The last part."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """Of the name."""
        return self._path.suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder it is in."""
        return self._at(self._path.parent)

    def resolve(self) -> "RemotePath":
        """Itself: URLs have no links."""
        return self

    def relative_to(self, other: "RemotePath") -> PurePosixPath:
        """The path below another."""
        return self._path.relative_to(other._path)

    def exists(self) -> bool:
        """Whether there is an object or a folder."""
        return self._fs.exists(str(self))

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        return self._fs.isdir(str(self))

    def is_file(self) -> bool:
        """Whether there is an object."""
        return self._fs.isfile(str(self))

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is in this folder."""
        for name in self._fs.ls(str(self), detail=False):
            found = PurePosixPath(self._fs._strip_protocol(name))
            yield self / found.name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Of the entries of this folder; `**` is not known."""
        return (
            entry for entry in (self.iterdir() if self.is_dir() else ()) if PurePosixPath(entry.name).match(pattern)
        )

    def walk(self) -> Iterator["RemotePath"]:
        """All files below."""
        root = PurePosixPath(self._fs._strip_protocol(str(self)))
        for name in self._fs.find(str(self)):
            yield self / PurePosixPath(self._fs._strip_protocol(name)).relative_to(root)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes the folder, where folders exist."""
        del parents
        self._fs.makedirs(str(self), exist_ok=exist_ok)

    def stat(self) -> _Stat:
        """The size; object stores tell no time that all of them mean the same by."""
        return _Stat(int(self._fs.info(str(self))["size"]), 0)

    def open(self, mode: str = "rb", **options: Any) -> Any:
        """A stream."""
        encoding = options.get("encoding")
        if "w" in mode:  # object stores have no folders, other file systems do
            self._fs.makedirs(str(self.parent), exist_ok=True)
        return self._fs.open(str(self), mode, **({"encoding": encoding} if encoding else {}))

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of it."""
        return self._fs.cat_file(str(self)).decode(encoding)

    def read_bytes(self) -> bytes:
        """All of it."""
        return self._fs.cat_file(str(self))

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes of a range, fewer where the object ends before `stop`."""
        return self._fs.cat_file(str(self), start=start, end=stop)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes it."""
        if self.exists() or not missing_ok:
            self._fs.rm_file(str(self))


Location = Path | RemotePath


def locate(path: "str | os.PathLike[str] | RemotePath") -> Location:
    """The place that a path or URL means.

    Raises:
        CheckpointError: there can be no such place, or the package for its scheme is not installed.
    """
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if "\0" in text:
        raise CheckpointError(f"{text!r}: no path has NUL characters; correct it")
    scheme, mark, rest = text.partition("://")
    if mark and scheme in _LOCAL:
        return Path(rest)
    return RemotePath(text) if mark else Path(text)


def config_source(path: Location) -> "Path | dict[str, Any]":
    """What `ModelConfig.from_hf` takes for the `config.json` of a model directory at any place.

    Raises:
        CheckpointError: a remote `config.json` is missing or not a JSON object.
    """
    if isinstance(path, Path):
        return path
    file = path / "config.json"
    try:
        return parse_json(file, file.read_bytes(), "text")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); give a model directory") from None


# ---- reading ---------------------------------------------------------------------------------------------------------
class RangeReader:
    """Reads ranges of files that stay open: `pread` for local files, one request per range for remote ones.

    Safe to share between threads. Buffers that come back by `reuse` serve later reads: memory fresh from the system
    costs a page fault for every page, as much time as reading does.
    """

    _KEPT = 32
    """Buffers that wait for their next use."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._free.clear()
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)

    def read(self, file: Location, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], writable.

        Raises:
            CheckpointError: the file cannot be read or ends before.
        """
        buffer = self._buffer(nbytes)
        try:
            if isinstance(file, RemotePath):
                content = np.frombuffer(file.read_range(offset, offset + nbytes), np.uint8)
                count = len(content)
                buffer[:count] = content
            else:
                count = self._pread(file, buffer, offset)
        except OSError as error:
            raise CheckpointError(
                f"{file}: {error.strerror or error}; check the disk, the network and the permissions"
            ) from None
        if count < nbytes:
            raise CheckpointError(f"{file}: ends {nbytes - count} bytes too early; fetch it again")
        return buffer

    def reuse(self, content: np.ndarray) -> None:
        """Takes back what `read` gave, or a view of it, for later reads; nobody may look at it any more."""
        while isinstance(content.base, np.ndarray):
            content = content.base
        if content.dtype == np.uint8 and content.ndim == 1 and content.flags.owndata and content.nbytes >= _REUSED:
            with self._lock:
                self._free.append(content)
                del self._free[: -self._KEPT]

    def _buffer(self, nbytes: int) -> np.ndarray:
        with self._lock:
            for place, buffer in enumerate(self._free):
                if nbytes <= buffer.nbytes <= 2 * nbytes:
                    del self._free[place]
                    return buffer[:nbytes]
        return np.empty(nbytes, np.uint8)

    def _pread(self, file: Path, buffer: np.ndarray, offset: int) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            opened = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            descriptor = self._descriptors.setdefault(file, opened)
            if descriptor != opened:  # another thread was first
                os.close(opened)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:].data], offset + done)
            if count == 0:
                break
            done += count
        return done


# ---- writing ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
    """Turns what goes wrong in writing into a message for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        remedy = "give another output directory or change its permissions"
        if "space" in text or "quota" in text.lower() or "too large" in text:
            remedy = "free disk space and go on with --resume, or remove what is unfinished and give another directory"
        raise CheckpointError(f"{path}: cannot be written ({text}); {remedy}") from None


@contextlib.contextmanager
def appearing_whole(file: Location) -> Iterator[Any]:
    """A stream to write a file through that appears under its name only when it is whole and on the disk.

    An object store shows an object when its upload ends; after an error the unfinished upload is given up.
    """
    if isinstance(file, RemotePath):
        stream = file.open("wb")
        try:
            yield stream
        except BaseException:
            with contextlib.suppress(Exception):
                getattr(stream, "discard", stream.close)()
            raise
        stream.close()
        return
    partial = file.with_name(f"{file.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with io.FileIO(partial, "w") as stream:
        yield stream  # unbuffered: pieces are megabytes
        os.fsync(stream.fileno())
    partial.replace(file)
    _sync_directory(file.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(stream: Any, content: Any) -> None:
    """Writes every byte, whatever the system takes at a time."""
    view = memoryview(content).cast("B")
    while view:
        count = stream.write(view)
        view = view[count:]


def write_json(file: Location, data: Any) -> None:
    """Writes a JSON file that is whole or absent."""
    with appearing_whole(file) as stream:
        write_all(stream, (json.dumps(data, indent=2) + "\n").encode())
