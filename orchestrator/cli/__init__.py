"""The command `troupe`: a room per group of commands, which register themselves with the application when imported.

Each command imports what it needs when it is called, so that help and refusals appear at once.
"""

from orchestrator.cli import (  # noqa: I001  in this order `troupe --help` lists them
    training as training,
    models as models,
    completions as completions,
    inspection as inspection,
    control as control,
    engines as engines,
    service as service,
    watching as watching,
)
from orchestrator.cli.application import BROKEN as BROKEN, REFUSED as REFUSED, app as app
from orchestrator.cli.entry_point import main as main
