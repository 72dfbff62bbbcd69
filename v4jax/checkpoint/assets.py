"""What a model directory holds beside its weights: tokenizer, chat encoding, licence."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from v4jax.checkpoint.location import Location, RemotePath, appearing_whole, write_all, writing

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
)
_FOLDERS = ("encoding",)


def copy_assets(source: Location, destination: Location) -> None:
    """Copies those that are there.

    Raises:
        CheckpointError: one cannot be read or written.
    """
    for name in [*_FILES, *_in_folders(source)]:
        file, target = source / str(name), destination / str(name)
        if file.is_file():
            with writing(target), appearing_whole(target) as stream:
                write_all(stream, file.read_bytes())


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
