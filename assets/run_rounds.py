"""`oapl run`: rounds one after another, through the data folder's Dagster instance, with progress on the terminal.

All rounds run in this process, which keeps its imports; each stage that computes is a process of its own. What an
earlier call finished is not done again. Afterwards `oapl ui` shows the runs, their metadata and pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from assets.running.instance import open_instance, prepare_home
from assets.running.settings import DEFAULT_RUN, Chosen, root_of
from assets.running.tables import summary_tables
from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.evaluation.report import write_report
from pipeline.layout import Run, dagster_home, round_key
from pipeline.planning import preflight
from pipeline.recipe import Recipe, load_recipe
from pipeline.runs.open import open_run
from pipeline.runs.stages import read_stages

if TYPE_CHECKING:
    import dagster as dg
    from rich.console import Console

    from pipeline.runs.at_url import RemoteRun

PASSING = re.compile(r" s left$")
"""A line that the next one replaces, on a terminal."""
INTERRUPTED = 130
RUN_TAG, STARTED_BY = "oapl/run", "oapl/started_by"


def main() -> int:
    arguments = _arguments()
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        if arguments.no_preflight:
            os.environ[preflight.SKIP] = "0"
        root, url = root_of(arguments.root)
        remote = Chosen(root, recipe.name, url=url).remote(recipe.name)
        with _brought(remote):
            preflight.check(recipe, Run(root, recipe.name).path)
            run = open_run(root, recipe)
            chosen = Chosen(root, str(run.recipe), url=url)
            os.environ |= chosen.environment() | {"DAGSTER_HOME": str(prepare_home(root))}
            with _only_one(run), _terminal(run) as console:
                make_rounds(run, recipe, console, remote)
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("oapl: interrupted; what was committed is kept, run the same command to go on\n")
        return INTERRUPTED
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.run_rounds", description=__doc__)
    parser.add_argument("--recipe", default=DEFAULT_RUN)
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--no-preflight", action="store_true", help="try neither engine nor learner first")
    parser.add_argument("--root", default="data", help="a folder or a URL")
    return parser.parse_args()


@contextlib.contextmanager
def _brought(remote: RemoteRun | None) -> Iterator[None]:
    """A run at a URL as it is now, while no other machine works on it."""
    if remote is None:
        yield
        return
    with remote.held(lambda line: print(line, file=sys.stderr)):  # noqa: T201
        remote.bring()
        yield


@contextlib.contextmanager
def _only_one(run: Run) -> Iterator[None]:
    """Two calls over one run would open the same round twice."""
    with (run.path / ".running").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"run {run.path} is being worked on by another `oapl run`; wait for it") from None
        yield


@contextlib.contextmanager
def _terminal(run: Run) -> Iterator[Console]:
    """A console on the real standard error, while everything else that is written there goes to a file.

    Dagster captures the streams of a step and repeats them; none of that is for the person who waits.
    """
    from rich.console import Console

    log = run.path / "logs" / "dagster.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    sys.stdout.flush()
    streams = [os.dup(1), os.dup(2)]
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as screen, log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=screen, highlight=False)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(streams[0], 1)
            os.dup2(streams[1], 2)


def make_rounds(run: Run, recipe: Recipe, console: Console, remote: RemoteRun | None = None) -> None:
    """Materialises the recipe's rounds that are not there yet. Raises OaplError with the failed stage's one line."""
    started = time.monotonic()
    console.print(f"run [bold]{run.name}[/] in {remote.url if remote else run.path}: {recipe.rounds} rounds")
    if remote is not None:
        remote.send_recipe()
        console.print(f"working copy: {run.path}", style="dim", soft_wrap=True)
    missing = [round for round in range(recipe.rounds) if not _is_done(run, round)]
    for round in range(recipe.rounds):
        if round not in missing:
            console.print(f"round {round_key(round)}: was done before", style="dim")
    if missing:
        _materialise(run, missing, console)
    found = write_report(run)
    if remote is not None:
        remote.send()
    console.print()
    for table in summary_tables(found):
        console.print(table)
    console.print(f"{time.monotonic() - started:.0f} s in all", style="dim")
    for what, where in (("Picture", run.picture), ("Numbers", run.summary), ("Page", run.page)):
        console.print(f"{what}: {where}", soft_wrap=True)
    console.print(f"Look around: oapl ui --root {remote.root if remote else run.data}", soft_wrap=True)


def _is_done(run: Run, round: int) -> bool:
    """Evaluated is the last thing that happens to a round; what lies before it was there then."""
    return run.evaluation(round).exists() and "evaluate" in read_stages(run, round)


def _materialise(run: Run, missing: list[int], console: Console) -> None:
    console.print("starting Dagster", style="dim")
    from assets import rounds
    from assets.definitions import defs
    from assets.running import terminal

    job = defs.resolve_job_def("whole_round")
    with open_instance(dagster_home(run.data)) as instance:
        _settle_older_runs(instance, run)
        for round in missing:
            rounds.open_rounds(instance, round)
            with _progress(console, f"round {round_key(round)}", terminal.NAME):
                result = job.execute_in_process(
                    instance=instance,
                    partition_key=round_key(round),
                    raise_on_error=False,
                    run_config={"loggers": {"terminal": {}}},
                    tags={RUN_TAG: run.name, STARTED_BY: "oapl run"},
                )
            if not result.success:
                raise _error_of(result, run)


def _settle_older_runs(instance: dg.DagsterInstance, run: Run) -> None:
    """Fails what a killed `oapl run` left as started; refuses to go on beside a round that the UI launched."""
    import dagster as dg

    started = dg.RunsFilter(tags={RUN_TAG: run.name}, statuses=[dg.DagsterRunStatus.STARTED])
    for old in instance.get_runs(started):
        if STARTED_BY not in old.tags:
            raise RequestError(
                f"round {old.tags.get('dagster/partition')} of run {run.name} is being made from the UI; wait for it"
            )
        # The lock that a live one would hold is ours.
        instance.report_run_failed(old, "the process of `oapl run` is gone")
    # Nobody else frees the places in pools that a killed process held: only a daemon would, and the UI may be closed.
    for holder in instance.event_log_storage.get_concurrency_run_ids():
        holding = instance.get_run_by_id(holder)
        if holding is None or holding.is_finished:
            instance.event_log_storage.free_concurrency_slots_for_run(holder)


@contextlib.contextmanager
def _progress(console: Console, what: str, logger: str) -> Iterator[None]:
    """Shows what steps say: the newest line live on a terminal, else a line each."""
    with console.status(f"{what} · starting") if console.is_terminal else contextlib.nullcontext() as status:
        handler = _Lines(console, what, status)
        logging.getLogger(logger).addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger(logger).removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self, console: Console, what: str, status: Any) -> None:
        super().__init__()
        self._console, self._what, self._status = console, what, status

    def emit(self, record: logging.LogRecord) -> None:
        meta: dict[str, Any] = getattr(record, "dagster_meta", {})
        # Steps speak at INFO; everything else is Dagster's own.
        if meta.get("dagster_event") is not None or record.levelno != logging.INFO:
            return
        text = f"{self._what} · {meta.get('orig_message', record.getMessage())}"
        if self._status is not None and (PASSING.search(text) or ": started;" in text):
            self._status.update(text.partition("; its whole")[0])
        else:
            self._console.print(text, markup=False, soft_wrap=True)


def _error_of(result: dg.ExecuteInProcessResult, run: Run) -> OaplError:
    """What the first failed check or step said, as the error that it was there."""
    for check in result.get_asset_check_evaluations():
        if not check.passed and check.blocking:
            asset = check.asset_key.path[-1]
            return WorkError(f"{asset} failed its check {check.check_name}: {check.description}")
    for event in result.all_events:
        if event.is_step_failure:
            failure = event.step_failure_data.user_failure_data
            if failure is not None and failure.description:
                code = failure.metadata.get("exit_code")
                kind = RequestError if code is not None and code.value == RequestError.exit_code else WorkError
                return kind(failure.description)
            error = event.step_failure_data.error
            if error is not None and error.cls_name == "DagsterExecutionInterruptedError":
                raise KeyboardInterrupt
            words = _innermost(error) if error else "no reason was recorded"
            return WorkError(f"{event.step_key}: {words}; the whole story is in {run.path / 'logs' / 'dagster.log'}")
    return WorkError(f"the round was not finished; see {run.path / 'logs' / 'dagster.log'}")


def _innermost(error: Any) -> str:
    while error.cause is not None:
        error = error.cause
    return " ".join(str(error.message).split())


if __name__ == "__main__":
    sys.exit(main())
