"""The errors that a user can cause. The command line prints their message alone; the traceback needs `--debug`."""


class UserError(ValueError):
    """Bad input: the message says what, what was found, what is needed, and the remedy."""


class UsageError(UserError):
    """Flags that cannot go together: the command line's exit code is 2, as for an unknown flag."""
