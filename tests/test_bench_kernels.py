"""`bench kernels` without the compiler: which cases, what a row says, the table and the picture."""

import dataclasses
import json
import re

import pytest

from kernels_pallas.aot import Measurement
from kernels_pallas.cases import all_cases, find_cases, floor_cycles
from kernels_pallas.tpu import CHIPS
from v4jax import bench_kernels
from v4jax.bench_kernels import KernelOptions, make_report, make_row, run, select_cases
from v4jax.bench_kernels_report import draw, markdown
from v4jax.cli import main
from v4jax.errors import UsageError, UserError

SEAM = find_cases(("hyper_connection_seam/flash-seam-2048",))[0]
MEASURED = Measurement(
    SEAM.label,
    "v6e",
    cycles_static=250_000,
    bundles=220_000,
    vmem_bytes=1 << 25,
    memory={"temp": 0},
    versions={"jax": "0"},
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
    uncounted = dataclasses.replace(SEAM, counts_bundles=False)
    assert make_row(uncounted, dataclasses.replace(MEASURED, cycles_static=None))["ratio"] is None
    # The compiler's model knows no bandwidth: nothing counts as faster than its traffic.
    assert make_row(SEAM, dataclasses.replace(MEASURED, cycles_static=1000))["ratio"] == 1.0
    assert make_row(SEAM, Measurement(SEAM.label, "v6e", error="no"))["ratio"] is None


def test_the_seams_floor_is_its_traffic():
    # Streams in and out, one output in, one input out in bf16; fn once.
    assert floor_cycles(SEAM, CHIPS["v6e"]) == pytest.approx((2048 * 4096 * 2 * 10 + 24 * 16384 * 4) / 937)


def test_the_table_and_the_picture_show_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    other = dataclasses.replace(MEASURED, chip="tpu7x", versions={"jax": "1"})
    report = make_report([make_row(SEAM, other), make_row(SEAM, MEASURED)]) | {"date": "2026-01-01"}
    text = markdown(report)
    assert re.search(r"## v6e\n\n.*2026-01-01 with jax 0", text)
    assert re.search(r"## tpu7x\n\n.*2026-01-01 with jax 1", text)
    assert text.index("v6e") < text.index("tpu7x")
    assert len(re.findall(r"\| hyper_connection_seam \| flash-seam-2048 \| 250\.0k \| 220\.0k \|", text)) == 2
    draw(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_chip_or_operation_is_a_usage_error(capsys):
    assert main(["bench", "kernels", "--chip", "v9"]) == 2
    assert "--chip: got v9, need v5e, v5p, v6e, tpu7x" in capsys.readouterr().err
    assert main(["bench", "kernels", "--op", "nothing"]) == 2


@pytest.mark.parametrize("verb", ["model", "kernels"])
def test_a_report_that_could_not_be_written_is_refused_before_the_work(verb, capsys):
    assert main(["bench", verb, "--json", "/nowhere/f.json"]) == 1
    assert "--json: cannot write /nowhere/f.json: no such directory; make it first" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Rows are written one by one; a resumed run compiles what has no figures, or no static ones if asked for them."""
    names = (
        "hyper_connection_seam/flash-seam-2048",
        "hyper_connection_seam/flash-seam-64",
        "hyper_connection_leave/flash-leave-64",
    )
    compiled, dying = [], [names[1]]

    def measure(cases, chip, *, static, **_):
        for case in cases:
            if case.label in dying:
                raise KeyboardInterrupt
            compiled.append((case.label, static))
            error = "no" if case.label == names[2] and not static else None
            yield dataclasses.replace(
                MEASURED, label=case.label, chip=chip.name, error=error, cycles_static=100 if static else None
            )

    monkeypatch.setattr(bench_kernels, "measure_cases", measure)
    options = KernelOptions(chip=("v6e",), op=names, json=tmp_path / "f.json", static=False, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    rows = json.loads(options.json.read_text())["rows"]
    assert [row["case"] for row in rows] == ["flash-seam-2048"]
    dying.clear()
    with pytest.raises(UserError, match="1 of 3 cases did not compile"):
        run(options)
    assert [label for label, _ in compiled] == list(names)
    compiled.clear()
    run(dataclasses.replace(options, static=True))
    assert compiled == [(name, True) for name in names]
    compiled.clear()
    run(options)
    assert compiled == []
    rows = json.loads(options.json.read_text())["rows"]
    assert [row["cycles_static"] for row in rows] == [100] * 3


def test_a_report_that_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(UsageError, match="got no --json"):
        run(KernelOptions(resume=True))
    (tmp_path / "f.json").write_text("[]")
    with pytest.raises(UserError, match=r"f\.json is no report"):
        run(KernelOptions(resume=True, json=tmp_path / "f.json"))
