"""What a model directory holds beside its weights: tokenizer, chat encoding, licence."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from v4jax.checkpoint.location import Location, RemotePath, appearing_whole, write_all, writing
from v4jax.checkpoint.tensor_file import CheckpointError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)
_FOLDERS = ("encoding", "additional_chat_templates")


def copy_assets(source: Location, destination: Location) -> None:
    """Copies those that are there.

    Raises:
        CheckpointError: one cannot be read or written.
    """
    for name in _found(source):
        target, content = destination / name, _read(source / name)
        with writing(target), appearing_whole(target) as stream:
            write_all(stream, content)


def differing_assets(output: Location, source: Location) -> list[str]:
    """Those of the source that the output lacks or has changed, a line each.

    Raises:
        CheckpointError: one cannot be read.
    """
    lines = []
    for name in _found(source):
        if not (output / name).is_file():
            lines.append(f"{name}: is not in the output")
        elif _read(output / name) != _read(source / name):
            lines.append(f"{name}: differs from the source's")
    return lines


def _read(file: Location) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); check the permissions") from None


def _found(source: Location) -> list[str]:
    return [str(name) for name in [*_FILES, *_in_folders(source)] if (source / str(name)).is_file()]


def _in_folders(source: Location) -> Iterator[PurePath]:
    for folder in _FOLDERS:
        place = source / folder
        if isinstance(source, RemotePath) and isinstance(place, RemotePath):
            found = [file.relative_to(source) for file in place.walk()] if place.is_dir() else []
        else:  # os.walk does not follow links to directories, so there are no loops
            found = [
                Path(parent, name).relative_to(str(source))
                for parent, _, files in os.walk(str(place))
                for name in files
            ]
        yield from (file for file in found if file.suffix != ".pyc")
