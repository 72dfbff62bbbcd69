"""`bench kernels` without the compiler: which cases, what a row says, the table and the picture."""

import dataclasses
import re

import pytest

from kernels_pallas.aot import Measurement
from kernels_pallas.cases import all_cases, find_cases, floor_cycles
from kernels_pallas.tpu import CHIPS
from v4jax.bench_kernels import draw, make_row, markdown, select_cases
from v4jax.cli import main
from v4jax.errors import UsageError

SEAM = find_cases(("hyper_connection_seam/flash-seam-2048",))[0]
MEASURED = Measurement(
    SEAM.label, "v6e", cycles_static=250_000, bundles=220_000, vmem_bytes=1 << 25, memory={"temp": 0}
)


def test_cases_are_chosen_by_operation_or_label_once():
    assert select_cases(()) == all_cases()
    chosen = select_cases((SEAM.label, SEAM.op))
    assert chosen[0] is SEAM
    assert {case.label for case in chosen} == {case.label for case in all_cases() if case.op == SEAM.op}
    assert len(chosen) == len({case.label for case in chosen})
    with pytest.raises(UsageError, match=r"got 'seam', need .*hyper_connection_seam"):
        select_cases(("seam",))


def test_a_row_has_the_promised_keys_and_the_ratio_of_s_or_of_b():
    row = make_row(SEAM, MEASURED)
    assert {"op", "case", "chip", "cycles_static", "bundles", "floor_cycles", "ratio", "vmem_bytes", "best_known",
            "measured_seconds"} <= set(row)  # fmt: skip
    floor = floor_cycles(SEAM, CHIPS["v6e"])
    assert row["ratio"] == pytest.approx(250_000 / floor)
    assert row["ratio_kind"] == "S"
    without = make_row(SEAM, dataclasses.replace(MEASURED, cycles_static=None))
    assert without["ratio"] == pytest.approx(220_000 / floor)
    assert without["ratio_kind"] == "B"
    # The compiler's model knows no bandwidth: nothing counts as faster than its traffic.
    assert make_row(SEAM, dataclasses.replace(MEASURED, cycles_static=1000))["ratio"] == 1.0
    assert make_row(SEAM, Measurement(SEAM.label, "v6e", error="no"))["ratio"] is None


def test_the_seams_floor_is_its_traffic():
    # Streams in and out, one output in, one input out in bf16; fn once.
    assert floor_cycles(SEAM, CHIPS["v6e"]) == pytest.approx((2048 * 4096 * 2 * 10 + 24 * 16384 * 4) / 937)


def test_the_table_and_the_picture_show_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    report = {"rows": [make_row(SEAM, MEASURED)], "versions": {"jax": "0"}, "date": "2026-01-01"}
    text = markdown(report)
    assert re.search(r"\| v6e \| hyper_connection_seam \| flash-seam-2048 \| 250\.0k \| 220\.0k \|", text)
    assert "2026-01-01 with jax 0" in text
    draw(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_chip_or_operation_is_a_usage_error(capsys):
    assert main(["bench", "kernels", "--chip", "v9"]) == 2
    assert "--chip: got v9, need v5e, v5p, v6e, tpu7x" in capsys.readouterr().err
    assert main(["bench", "kernels", "--op", "nothing"]) == 2
