"""The command line: verbs, exit codes, messages."""

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro

from v4jax import cli
from v4jax.errors import UsageError, UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Do a thing.

    Or another.
    """

    path: tyro.conf.Positional[str]
    """Where."""
    mtp: bool = False
    quant_sim: str = "auto"


@pytest.fixture
def verb(monkeypatch):
    """A verb of our own; set `run` to what it shall do."""
    module = types.ModuleType("a_verb")
    module.Options, module.run = Options, print
    monkeypatch.setitem(sys.modules, "a_verb", module)
    monkeypatch.setitem(cli.VERBS, "thing", cli.Verb("a_verb", "does a thing"))
    return module


def raising(error):
    def run(options):
        raise error

    return run


def test_a_verb_gets_its_options_and_they_are_printed_to_stderr_first(verb, capfd):
    verb.run = lambda options: print(options.path, options.mtp)
    assert cli.main(["thing", "here", "--mtp"]) == 0
    out, err = capfd.readouterr()
    assert out == "here True\n"
    assert err.split() == ["v4jax", "thing", "path", "here", "mtp", "True", "quant_sim", "auto"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("size: got 1, need 2"), 1, "v4jax: size: got 1, need 2\n"),
        (UsageError("--a: not with --b"), 2, "v4jax: --a: not with --b\n"),
        (PermissionError(13, "Permission denied", "/out"), 1, "v4jax: [Errno 13] Permission denied: '/out'\n"),
        (OSError(28, "No space left on device", "/out"), 1, "v4jax: [Errno 28] No space left on device: '/out'\n"),
        (KeyboardInterrupt(), 130, "v4jax: interrupted\n"),
    ],
    ids=["user", "usage", "permission", "disk full", "interrupt"],
)
def test_an_error_is_one_message_and_an_exit_code(verb, capfd, error, code, message):
    verb.run = raising(error)
    assert cli.main(["thing", "here"]) == code
    assert capfd.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    "arguments", [["thing", "here", "--debug"], ["thing", "--debug", "here"], ["--debug", "thing", "here"]]
)
def test_debug_shows_the_traceback(verb, arguments):
    verb.run = raising(UserError("bad"))
    with pytest.raises(UserError, match="bad"):
        cli.main(arguments)


def test_a_defect_of_ours_is_not_hidden(verb):
    verb.run = raising(KeyError("bug"))
    with pytest.raises(KeyError):
        cli.main(["thing", "here"])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["--help"], 0), (["nothing"], 2), (["thing"], 2), (["thing", "--help"], 0), (["thing", "x", "--no"], 2)],
    ids=["nothing", "help", "unknown verb", "missing argument", "help of a verb", "unknown flag"],
)
def test_exit_code_of_usage(verb, arguments, code, capfd):
    assert cli.main(arguments) == code
    assert "Traceback" not in capfd.readouterr().err


def test_the_overview_lists_every_verb(capfd):
    cli.main(["--help"])
    out = capfd.readouterr().out
    assert all(f"  {name} " in out for name in cli.VERBS)


def test_the_help_is_not_indented(verb, capfd):
    cli.main(["thing", "--help"])
    assert "\nDo a thing.\n\nOr another.\n" in capfd.readouterr().out


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself(name, capfd):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: v4jax {name}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ([], []),
        (["p", "--quant-sim"], ["p", "--quant-sim", "on"]),
        (["--quant-sim", "p"], ["--quant-sim", "on", "p"]),
        (["--quant-sim", "--mtp"], ["--quant-sim", "on", "--mtp"]),
        (["--quant-sim", "off", "p"], ["--quant-sim", "off", "p"]),
        (["--quant-sim=off"], ["--quant-sim=off"]),
    ],
)
def test_a_bare_quant_sim_means_on(given, want):
    assert cli.fill_bare_flags(given, cli._BARE_FLAGS) == want


def test_a_closed_pipe_ends_quietly():
    root = str(Path(__file__).resolve().parent.parent)
    command = f"{sys.executable} -m v4jax info tiny | head -n 1"
    found = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, check=False
    )
    assert found.stdout == "Config\n"
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr
