"""How a process ends that has done its work and loaded an engine or a process group."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """Ends the process at once, with status 0: for one whose results are on the disk.

    Taking vLLM down in order costs seconds, and a rank was seen to end with SIGABRT ("terminate called without an
    active exception") after it had published, which failed its round.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
