"""The directory of a training run: whose it is, and the training states in it.

States are written by orbax's CheckpointManager: in the background, complete or absent, the oldest removed. A state is a
pytree of arrays and a small JSON object; what they mean is the caller's business.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from v4jax.errors import UserError

_MARKER = "finetune.json"
DATA = "data"
"""Where a run keeps its tokens."""
_SAMPLE_BYTES = 1 << 16


class RunDirectory:
    """A directory that belongs to one training run, or is made for it.

    Args:
        path: missing, empty, or the directory of the same run.
        identity: JSON object that decides what the run computes, and with it whether this is the same run.
        free: keys of `identity` that may differ.

    Raises:
        UserError: the directory holds something else, belongs to a run with another identity (the message lists what
            differs), or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, free: Collection[str] = ()) -> None:
        self.path = path
        marker = path / _MARKER
        self._was_there, self._is_new = path.exists(), not marker.is_file()
        wanted = json.loads(json.dumps(identity))
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: is a file, need a directory; choose another name")
        if marker.is_file():
            self._check_same(_read_json(marker), wanted, free)
        elif path.is_dir() and any(not entry.name.endswith(".partial") for entry in path.iterdir()):
            raise UserError(
                f"--out {path}: holds other files and no {_MARKER}, so it is no run to go on with; "
                "choose a new or an empty directory"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(marker, wanted)
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another directory") from None

    @contextlib.contextmanager
    def left_as_found_on_error(self) -> Iterator[None]:
        """Where a run ends that was only now begun, nothing of it stays: it will be begun otherwise."""
        try:
            yield
        except BaseException:
            if self._is_new:
                (self.path / _MARKER).unlink()
                shutil.rmtree(self.path / DATA, ignore_errors=True)
            if not self._was_there:
                with contextlib.suppress(OSError):  # somebody put something there
                    self.path.rmdir()
            raise

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any], free: Collection[str]) -> None:
        keys = sorted(key for key in found.keys() | wanted.keys() if key not in free)
        differing = [key for key in keys if found.get(key) != wanted.get(key)]
        if differing:
            lines = "\n".join(f"  {key}: it has {found.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
            raise UserError(
                f"--out {self.path}: belongs to a run with other settings\n{lines}\n"
                "repeat its settings to go on with it, or choose another directory"
            )


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is whole or absent."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); choose another --out") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got {type(value).__name__}, need a JSON object; choose another --out")
    return value


def fingerprint(model: Path) -> str:
    """Stands for the contents of a model directory: of each JSON and weight file the size, head, middle and tail."""
    digest = hashlib.sha256()
    folders = (model, model / "layers", model / "mtp")  # not a run inside of the model's directory
    files = [model] if model.is_file() else sorted(path for one in folders for path in one.glob("*.safetensors"))
    for path in [*sorted(model.glob("*.json")), *files]:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model)} {size}\n".encode())
        with open(path, "rb") as file:
            for offset in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class StateStore:
    """The saved states of a run. A context manager: leaving it waits for the write in progress.

    Args:
        directory: made if missing; its parent must exist.
        keep: how many states stay.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        _remove_unfinished(directory)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "StateStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the newest complete state, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Starts to write a state, after waiting for the one before. The arrays may be donated at once."""
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(state=args.PyTreeSave(state), progress=args.JsonSave(copy.deepcopy(dict(progress)))),
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a state.

        Args:
            step: one that `latest_step` gave.
            like: a tree of arrays or `ShapeDtypeStruct`s with shardings, whose structure, shapes, dtypes and shardings
                the result has.

        Raises:
            UserError: what is stored does not fit `like`, or is damaged.
        """
        ocp, target = self._ocp, jax.tree.map(_abstract, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(target, restore_args=restore_args), progress=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:
            # Of an array's damaged file orbax makes a bare Exception; what is none of these is not the state's fault.
            if type(error) is not Exception and not isinstance(error, ValueError | KeyError | FileNotFoundError):
                raise
            raise self.damaged(step, error) from error
        if not isinstance(restored["progress"], dict):
            raise self.damaged(step, TypeError("its progress is not a JSON object"))
        return restored["state"], restored["progress"]

    def damaged(self, step: int, error: Exception) -> UserError:
        """What to raise where a state turns out not to be one."""
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return UserError(
            f"{self._manager.directory / str(step)}: cannot be restored ({reason}); "
            "remove this state to go on from the one before it"
        )

    def wait(self) -> None:
        """Returns when the state being written is complete."""
        self._manager.wait_until_finished()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: what `StateStore.restore` needs, without the memory."""
    return jax.tree.map(_abstract, tree)


def _remove_unfinished(directory: Path) -> None:
    """Removes the states that a killed process was writing."""
    import orbax.checkpoint as ocp

    for path in directory.iterdir() if directory.is_dir() else ():
        if path.is_dir() and not ocp.utils.is_checkpoint_finalized(path):
            shutil.rmtree(path)
