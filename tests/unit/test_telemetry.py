"""Figures of finished parts."""

from surf import telemetry
from surf.telemetry import Clock


def test_a_part_that_took_next_to_no_time_counts_and_one_that_is_gone_does_not(tmp_path):
    for name in ("gone", "here"):  # the first one also waits for an import
        Clock().note(tmp_path / f"{name}.parquet", 3)
    (tmp_path / "here.parquet").touch()
    (figures,) = telemetry.figures(tmp_path)
    assert figures["rows"] == 3 and figures["work_seconds"] > 0
