"""Every method that samples, three steps each, in this process and with the hf engine. With vLLM and Ray:
`tests/ray/test_online_methods.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.loading import config_of
from orchestrator.run import run
from tests.online_phases import assert_three_steps_of_each, recipe

pytestmark = pytest.mark.timeout(600)


def test_every_method_that_samples_takes_three_steps_from_a_policy_that_is_its_own_reference(tmp_path: Path) -> None:
    result = run(config_of(recipe(tmp_path, {"engine": "hf"}), [], "test"), local=True)
    assert_three_steps_of_each(result.folder, tolerance=1e-5)
