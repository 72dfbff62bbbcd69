"""Makes docs/plans: compiles the cases below with `v4jax plan`, one after another, and writes what it says as tables.

`python scripts/plan_tables.py [NAME …]` compiles the named cases (all that have no file yet, if none is named), and
always writes docs/plans/README.md anew from the files that are there. A case takes minutes and up to 12 GiB.
"""

import json
import subprocess
import sys
from pathlib import Path

from v4jax.plan.report import rows

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "plans"

# Name → flags of `v4jax plan`.
CASES = {
    "flash-decode-8k-b64-v6e": "flash --topology v6e:4x4 --step decode --context 8192 --batch 64",
    "flash-decode-128k-b64-v6e": "flash --topology v6e:4x4 --step decode --context 131072 --batch 64",
    "flash-decode-1m-b1-v6e": "flash --topology v6e:4x4 --step decode --context 1048575 --batch 1",
    "flash-decode-1m-b8-v6e": "flash --topology v6e:4x4 --step decode --context 1048575 --batch 8",
    "flash-decode-8k-b64-tpu7x": "flash --topology tpu7x:2x2x1 --step decode --context 8192 --batch 64",
    "flash-decode-128k-b64-tpu7x": "flash --topology tpu7x:2x2x1 --step decode --context 131072 --batch 64",
    "flash-decode-1m-b1-tpu7x": "flash --topology tpu7x:2x2x1 --step decode --context 1048575 --batch 1",
    "flash-decode-1m-b8-tpu7x": "flash --topology tpu7x:2x2x1 --step decode --context 1048575 --batch 8",
    "flash-prefill-1m-v6e": "flash --topology v6e:8x8 --step prefill --context 1048576 --batch 1 --chunk 8192",
    "pro-decode-8k-b64-tpu7x": "pro --topology tpu7x:2x2x2 --step decode --context 8192 --batch 64",
    "pro-decode-8k-b64-v5p": "pro --topology v5p:4x4x4 --step decode --context 8192 --batch 64",
    "flash-train-16k-v5p": "flash --topology v5p:8x8x8 --step train --context 16384 --batch 512",
    "flash-train-128k-v5p": "flash --topology v5p:8x8x8 --step train --context 131072 --batch 64",
    "pro-train-16k-v5p": "pro --topology v5p:8x16x16 --step train --context 16384 --batch 1024",
    "pro-train-16k-tpu7x": "pro --topology tpu7x:8x8x8 --step train --context 16384 --batch 256",
}


def main(names: list[str]) -> int:
    """Compiles, then writes the page; the exit code is that of the last case that failed to run."""
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"no case {unknown[0]}; need some of {', '.join(CASES)}", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    code = 0
    for name in names or [name for name in CASES if not (FOLDER / f"{name}.json").exists()]:
        command = [sys.executable, "-m", "v4jax", "plan", *CASES[name].split(), "--compiled", "1"]
        done = subprocess.run([*command, "--json", str(FOLDER / f"{name}.json")], check=False)
        code = done.returncode or code
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")
    return code


def page() -> str:
    """The page of all cases that have a file."""
    parts = [
        "# Plans\n\nWritten by `scripts/plan_tables.py` from what `v4jax plan` said of each case: the TPU compiler's "
        "own memory and program, for slices of the real size, without a TPU. Bounds are those of the compiled program "
        "at the chip's peak rates, as if products, HBM and links overlapped perfectly: no time here was measured.\n"
    ]
    for name, flags in CASES.items():
        file = FOLDER / f"{name}.json"
        if not file.exists():
            continue
        facts = json.loads(file.read_text(encoding="utf-8"))
        lines = [f"| {key} | {value.replace('|', '/')} |" for key, value in rows(facts)]
        parts.append("\n".join([f"## {name}\n", f"`v4jax plan {flags}`\n", "| | |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
