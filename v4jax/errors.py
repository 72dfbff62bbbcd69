"""The errors that a user can cause. The command line prints their message alone; the traceback needs `--debug`."""

from pathlib import Path


class UserError(ValueError):
    """Bad input: the message says what, what was found, what is needed, and the remedy."""


class UsageError(UserError):
    """Flags that cannot go together: the command line's exit code is 2, as for an unknown flag."""


def check_json_place(json: Path | None) -> None:
    """Refuses a `--json` in a directory that is not there: called before the work, which would otherwise be lost."""
    if json is not None and not json.parent.is_dir():
        raise UserError(f"--json: cannot write {json}: no such directory; make it first")
