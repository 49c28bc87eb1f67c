"""How those who are outside the links tell of a loss."""

from __future__ import annotations

from rollout.weights.collective import CollectiveSender
from rollout.weights.meeting import report_losses


def test_why_a_loss_could_not_be_told_is_returned():
    sender = CollectiveSender()
    address = sender.open()
    sender.close()
    assert "timed out" in report_losses(address, "order", ("a",), 0.5)
