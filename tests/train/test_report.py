"""What `metrics.jsonl` holds after a run goes on."""

import json
from pathlib import Path

import pytest

from v4jax.train.report import MetricsLog


@pytest.mark.parametrize(
    "damaged",
    [b'{"step": 1', b"\xff\xfe", b"[1, 2]", b'{"step": "1"}', b'{"loss": 1.0}', b"[" * 100_000, b"1" * 5000],
    ids=["open", "not UTF-8", "list", "text", "no step", "deep", "digits"],
)
def test_a_damaged_line_is_dropped_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bytes
) -> None:
    file, rows = tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    first, second = (json.dumps(row).encode() for row in rows)
    file.write_bytes(b"\n".join([first, damaged, damaged, second, b'{"step": 3, "lo']))
    assert MetricsLog(file, last_step=2).rows == rows
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    assert "metrics.jsonl: 2 damaged line(s) dropped" in capsys.readouterr().err


def test_a_line_that_a_kill_cut_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert MetricsLog(tmp_path / "metrics.jsonl", last_step=2).rows == [{"step": 1}]
    assert not capsys.readouterr().err
