"""The methods: one function each, from options to a pipeline. `METHODS` is all of them."""

from __future__ import annotations

from orchestrator.methods.build import build, find_method
from orchestrator.methods.table import METHODS

__all__ = ["METHODS", "build", "find_method"]
