"""All that Dagster is told, named one by one."""

from __future__ import annotations

import dagster as dg
from dagster._loggers import colored_console_logger

from assets.automation import known_rounds, next_round, nightly_retraining, report_failures
from assets.frozen_policy import frozen_policy
from assets.jobs import JOBS
from assets.pass_at_k import pass_at_k
from assets.prompt_set import prompt_set
from assets.rollout_dataset import rollout_dataset
from assets.rollouts import rollouts
from assets.rounds import CHOSEN
from assets.running.terminal import terminal
from assets.trained_policy import trained_policy
from assets.verdicts import verdicts

ASSETS = [prompt_set, frozen_policy, rollouts, verdicts, rollout_dataset, trained_policy, pass_at_k]

defs = dg.Definitions(
    assets=ASSETS,
    jobs=JOBS,
    schedules=[nightly_retraining],
    sensors=[next_round, known_rounds, report_failures],
    resources={"run_folder": CHOSEN},
    loggers={"console": colored_console_logger, "terminal": terminal},
    executor=dg.in_process_executor,
)
