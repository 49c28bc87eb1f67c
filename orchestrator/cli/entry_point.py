"""From the command line to a command, and from what a command raises to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from actors.errors import Interrupted, NotDone, RunError, UserError
from actors.imports import collect_less_often
from orchestrator.cli.application import BROKEN, REFUSED, app
from orchestrator.import_pin import pin


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process. Exit codes: 0 done, 1 failed, 2 the input is refused (a few lines, no traceback), 130
    Ctrl-C, 143 SIGTERM. `arguments`: default, the command line."""
    try:
        pin()
        collect_less_often()
        app(arguments)
    except UserError as error:
        _complain("refused", error)
        sys.exit(REFUSED)
    except NotDone as error:
        _complain("failed", error)
        sys.exit(BROKEN)
    except RunError as error:
        _complain("the run failed", error)
        sys.exit(BROKEN)
    except Interrupted as ended:  # it has said where it stands
        sys.exit(ended.exit_code)


def _complain(what: str, error: Exception) -> None:
    for line in (f"{what}: {error}", *getattr(error, "__notes__", [])):
        print(f"troupe: {line}", file=sys.stderr)
