"""The logger through which `oapl run` shows what steps say, without Dagster's own events."""

from __future__ import annotations

import logging

import dagster as dg

NAME = "oapl.rounds"


@dg.logger(None, description="What steps say of their progress, without Dagster's own events.")
def terminal(_: dg.InitLoggerContext) -> logging.Logger:
    logger = logging.getLogger(NAME)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger
