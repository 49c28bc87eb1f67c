"""`troupe plan` in a process of its own: it opens models and data, which takes memory, and may take long."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.config.schema import RunConfig
from orchestrator.restarts import COMMAND, REFUSED
from orchestrator.service.errors import Problem
from orchestrator.service.waiting import QUEUE_S, Places

PLAN_TIMEOUT_S = 300.0
ADDRESS = "RAY_ADDRESS"
AT_ONCE = 2  # each imports torch
_free = Places("plans", AT_ONCE)


async def plan(config: RunConfig, ray_address: str | None, *, queue_s: float = QUEUE_S) -> dict[str, Any]:
    """What `troupe plan --json` says, of the Ray at `ray_address`, else of a Ray that the run would start here. Raises
    Problem 422 with its words if it refuses the recipe, 504 after PLAN_TIMEOUT_S, 429 if AT_ONCE others have been made
    for `queue_s`. If it is cancelled its process ends."""
    with tempfile.TemporaryDirectory(prefix="troupe-plan-") as scratch:
        file = Path(scratch) / "recipe.json"
        file.write_text(config.model_dump_json())
        busy = Problem(429, f"{AT_ONCE} plans are being made already, and none ended in {queue_s:g} s; ask again later")
        async with _free.place(queue_s, busy):
            code, out, error = await _run([*COMMAND, "plan", str(file), "--json"], ray_address)
    lines = out.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    said = error.strip().replace(f"{file}", "the recipe").removeprefix("troupe: refused: ")
    if code == REFUSED:
        raise Problem(422, said)
    raise Problem(500, f"planning failed: {said[-2000:]}")


async def _run(command: list[str], ray_address: str | None) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if name != ADDRESS}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env=environment | ({ADDRESS: ray_address} if ray_address else {}),
    )
    try:
        async with asyncio.timeout(PLAN_TIMEOUT_S):
            out, error = await process.communicate()
    except TimeoutError:
        raise Problem(504, f"planning took longer than {PLAN_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:  # too late, or the client has gone
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(errors="replace"), error.decode(errors="replace")
