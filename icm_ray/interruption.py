"""Ctrl-C while a command still imports: one line and exit code 130, and no traceback.

torch takes seconds to import. Until a command's own work begins, nothing has to be cleaned up, so
the process may end on the spot. Imported before everything else; does nothing in other programs.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

CODE = 130
PROBLEM = "interrupted. Run the same command to resume."


def leave(_signal: int, _frame: FrameType | None) -> None:
    """End the process as an interrupted command does."""
    os.write(2, f"error: {PROBLEM}\n".encode())
    os._exit(CODE)


# Python calls itself "-m" while it imports the package of `python -m icm_ray` or `-m jobs.merge`.
# A handler that is not Python's own is left alone: nohup and & ignore Ctrl-C on purpose.
_IS_COMMAND = Path(sys.argv[0]).name in ("-m", "icm-ray")
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
