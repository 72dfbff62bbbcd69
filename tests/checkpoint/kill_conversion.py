"""Starts a conversion again and again, kills it at random moments, and resumes it: `kill_conversion.py SRC DIR TO N`.

One process that has imported everything forks a child per conversion, so that the moments fall into the conversion and
not into the imports. Prints how many kills found the child still at work.
"""

import hashlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from v4jax.checkpoint.convert import convert


def start(source: Path, out: Path, to: str, *, resume: bool) -> int:
    child = os.fork()
    if child:
        return child
    try:
        convert(source, out, to="hf" if to == "hf" else "v4jax", max_shard_bytes=2_000_000, resume=resume)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def finish(child: int) -> None:
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("a conversion failed")


def digest(path: Path) -> dict[str, str]:
    """Of all files; a record's times and paths are the same in every run."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    source, folder, to, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    begun = time.monotonic()
    finish(start(source, folder / "whole", to, resume=False))
    seconds = time.monotonic() - begun
    want = digest(folder / "whole")
    random, killed = np.random.default_rng(0), 0
    for number in range(count):
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        child = start(source, out, to, resume=False)
        time.sleep(random.uniform(0, seconds))
        if os.waitpid(child, os.WNOHANG) == (0, 0):
            killed += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        finish(start(source, out, to, resume=True))
        got = digest(out)
        if got != want:
            names = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
            raise SystemExit(f"kill {number}: {names} differ")
    print(f"{killed} of {count} killed at work")


main()
