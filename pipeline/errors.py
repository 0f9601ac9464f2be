"""What this project raises at people.

    OaplError
    ├── RequestError   the request was wrong: exit code 2
    └── WorkError      the request was right and the work failed: exit code 1

The message is one line for a person: what is wrong, where, and how to mend it. Commands print
it without a traceback; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class OaplError(Exception):
    """Base of all errors meant for a person."""

    exit_code = 1


class RequestError(OaplError, ValueError):
    """The request can't be carried out as given: a setting, a file or a flag must change."""

    exit_code = 2


class WorkError(OaplError, RuntimeError):
    """The request was sound, yet the work failed. What was committed before stays valid."""

    exit_code = 1
