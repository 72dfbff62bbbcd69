"""The errors that a user can cause. The command line prints their message alone; the traceback needs `--debug`."""

import os
from pathlib import Path


class UserError(ValueError):
    """Bad input: the message says what, what was found, what is needed, and the remedy."""


class UsageError(UserError):
    """Flags that cannot go together: the command line's exit code is 2, as for an unknown flag."""


def check_json_place(json: Path | None) -> None:
    """Refuses a `--json` that cannot be written: called before the work, which would otherwise be lost."""
    if json is not None:
        check_place("--json", json)


def check_place(flag: str, file: Path) -> None:
    """Refuses a file to write that is a directory, in a directory that is not there, or not this user's to write.

    Raises:
      UserError: naming the flag.
    """
    if file.is_dir():
        raise UserError(f"{flag}: cannot write {file}: it is a directory; name a file in it")
    if not file.parent.is_dir():
        raise UserError(f"{flag}: cannot write {file}: no such directory; make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{flag}: cannot write {file}: permission denied; name another place")
