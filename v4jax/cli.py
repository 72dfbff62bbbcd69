"""`v4jax <verb>`.

A verb is one row of `VERBS`: the module that owns it and one line of help. That module is imported only when its verb
is called, and has two names:

    @dataclasses.dataclass(frozen=True)
    class Options:                       # its docstring is the verb's description; its fields are the flags (tyro)
        path: tyro.conf.Positional[str]
        '''Model directory.'''
        mtp: bool = False
        '''Also compute the MTP block's logits.'''

    def run(options: Options) -> None:   # results to stdout, progress and messages to stderr

`Options` may also be a union of dataclasses, which makes sub-verbs (`bench model`, `bench kernels`). This file prints
the resolved options, turns a `UserError` or `OSError` into one message, and returns the exit code: 0 ok, 1 failure,
2 usage. A verb raises `UsageError` for flags that cannot go together.
"""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from v4jax import distributed
from v4jax.errors import UsageError, UserError


class Verb(NamedTuple):
    """The module with `Options` and `run`, and what the verb does."""

    module: str
    summary: str
    is_divided: bool = False
    """Whether it runs on a mesh, and so in several processes."""


VERBS: dict[str, Verb] = {
    "info": Verb("v4jax.info", "what a config or a checkpoint is: layers, parameters, tensors, implementations"),
    "convert": Verb("v4jax.checkpoint.verb", "between Hugging Face and v4jax model directories, any storage"),
    "verify": Verb("v4jax.verify", "a converted checkpoint against its source, or against transformers"),
    "logits": Verb(
        "v4jax.logits", "the logits of given tokens, at once, in chunks or one layer at a time", is_divided=True
    ),
    "generate": Verb("v4jax.serve.generate", "continue a prompt, or answer a message", is_divided=True),
    "finetune": Verb("v4jax.train.loop", "fine-tune on text; goes on where it stopped", is_divided=True),
    "evaluate": Verb("v4jax.train.evaluate", "loss, perplexity and accuracy on held-out text", is_divided=True),
    "plan": Verb("v4jax.plan.verb", "compile a step for a TPU slice without one: memory, FLOPs, traffic, bounds"),
    "bench": Verb("v4jax.bench_verb", "measure models beside a peer, or compile the TPU kernels for their cycles"),
}

# Flags whose value may be left out: flag → (what it then means, the values that count as its own).
_BARE_FLAGS = {"--quant-sim": ("on", ("auto", "on", "off"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code; raises nothing but with `--debug`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debugging = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        from v4jax import __version__

        print(f"v4jax {__version__}")
        return 0
    if name not in VERBS:
        return _complain(f"unknown verb {name!r}; need one of {', '.join(VERBS)} (`v4jax --help`)", 2)
    try:
        rest, group = distributed.take_flags(rest)
        is_group = VERBS[name].is_divided and distributed.start(group)
    except UserError as error:
        return _complain(str(error), 2 if isinstance(error, UsageError) else 1)
    code = _run_and_report(name, rest, is_debugging=is_debugging)
    if is_group and code:
        distributed.leave(code)
    return code


def _run_and_report(name: str, rest: list[str], *, is_debugging: bool) -> int:
    try:
        return _run_verb(name, rest)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`v4jax info … | head`): leave quietly, also when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        if is_debugging:
            raise
        return _complain(str(error), 2 if isinstance(error, UsageError) else 1)


def _run_verb(name: str, arguments: list[str]) -> int:
    import tyro

    module = importlib.import_module(VERBS[name].module)
    text = module.Options.__doc__ if isinstance(module.Options, type) else None
    try:
        options = tyro.cli(
            module.Options,
            prog=f"v4jax {name}",
            description=inspect.cleandoc(text or VERBS[name].summary),
            args=fill_bare_flags(arguments, _BARE_FLAGS),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # tyro has printed the help (0) or what is wrong (2)
        return stop.code if isinstance(stop.code, int) else 2
    _print_options(name, options)
    module.run(options)
    return 0


def fill_bare_flags(arguments: Sequence[str], flags: Mapping[str, tuple[str, Sequence[str]]]) -> list[str]:
    """Writes out the value of a flag that stands without one (`--quant-sim` → `--quant-sim on`)."""
    filled: list[str] = []
    for position, argument in enumerate(arguments):
        filled.append(argument)
        if argument in flags:
            meaning, values = flags[argument]
            if position + 1 == len(arguments) or arguments[position + 1] not in values:
                filled.append(meaning)
    return filled


def _print_options(name: str, options: Any) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold]v4jax {name}[/bold]")
    for field in dataclasses.fields(options):
        console.print(f"  [dim]{field.name}[/dim] {escape(str(getattr(options, field.name)))}")


def _complain(message: str, code: int) -> int:
    print(f"v4jax: {message}", file=sys.stderr)
    return code


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: v4jax VERB …",
            "",
            *lines,
            "",
            "`v4jax VERB --help` lists a verb's flags; --debug shows tracebacks.",
            "On several machines outside Cloud TPU: --coordinator HOST:PORT --processes N --process I on each.",
        ]
    )
