"""What telemetry does when one request cannot be accounted for."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import Kept, Scripted

from quire.serving.telemetry import telemetry as module
from quire.serving.telemetry.telemetry import Telemetry


@pytest.mark.parametrize("where", ["report", "account"])
def test_one_request_that_cannot_be_told_of_silences_no_other(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sound = module.report_of

    def failing(output: Any) -> Any:
        return 1 / 0 if output.request_id == "bad" else sound(output)

    class Failing(Kept):
        def ended(self, report: Any) -> None:
            super().ended(1 / 0 if report.request_id == "bad" else report)

    if where == "report":
        monkeypatch.setattr(module, "report_of", failing)
    kept, telemetry = Failing() if where == "account" else Kept(), Telemetry()
    telemetry.add(kept)
    s = Scripted(telemetry)
    s.submit("bad")
    s.run(0)
    s.submit("good")
    s.run(0)
    telemetry.close()
    assert [report.request_id for report in kept.reports] == ["good"]
    assert "request 'bad' is not accounted for" in caplog.text
