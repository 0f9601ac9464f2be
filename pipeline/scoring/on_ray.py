"""Judging on a Ray cluster: a task a shard of rollouts, each of which leaves a file of verdicts for the rest.

What a task has left is not judged again, whether its worker dies behind it or the whole judging is begun anew. The
files lie where the verdicts go, in a folder that all nodes share.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.generation import cluster
from pipeline.scoring.canaries import CANARIES
from pipeline.scoring.references import Places, References
from pipeline.storage.durable import write_durably
from pipeline.verifiers import find_verifier, judge
from pipeline.verifiers.cases import Case

if TYPE_CHECKING:
    from pipeline.recipe import Verification
    from pipeline.rollouts.store import Manifest, Shard

RETRIES = 3
"""How often a task whose worker died is tried again."""
_REFERENCES = "references.jsonl"

Numbered = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What every task is told."""

    rollouts: Path
    prompts: Path
    parts: Path
    settings: Verification
    versions: dict[str, str]
    """Of the verifiers, by task, as the driver has them."""


@contextlib.contextmanager
def judged_on_ray(
    rollouts: Path,
    manifest: Manifest,
    references: References,
    out: Path,
    journal: str,
    settings: Verification,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Numbered]:
    """Judges all shards; gives each verdict under its rollout's number, and behind them those of the canaries.

    Raises RequestError for a rollout without its prompt and for a node with other verifiers, WorkError where a
    shard's worker dies RETRIES times more than once.
    """
    parts = out.absolute() / f".scoring-{journal[:16]}"  # absolute, since workers have another current folder
    for other in out.absolute().glob(".scoring-*"):
        if other != parts:
            shutil.rmtree(other)
    parts.mkdir(exist_ok=True)
    one_task = settings.model_copy(update={"workers": settings.workers or 1})
    versions = {task: find_verifier(task).version() for task in sorted(references.tasks)}
    asked = Asked(rollouts.absolute(), references.prompts.absolute(), parts, one_task, versions)
    with cluster.connected("verify"):
        canaries = _run(asked, manifest, references, progress)
    yield _merged(parts, manifest, canaries)
    shutil.rmtree(parts)


def _run(
    asked: Asked, manifest: Manifest, references: References, progress: Callable[[int, int], None] | None
) -> dict[str, Path]:
    """Has every shard judged, and the canaries on every node; returns the files of the latter by their machine."""
    import ray

    needs = {"CPU": float(asked.settings.workers)}
    room = sum(cluster.nodes(needs).values())
    if not room:
        raise RequestError(f"no node of the Ray cluster has {asked.settings.workers} CPU; see verification.workers")
    missing = [shard for shard in manifest.shards if not (asked.parts / f"{shard.file}.jsonl").exists()]
    places = ray.put(references.lend(asked.parts / _REFERENCES)) if missing else None
    task = ray.remote(num_cpus=asked.settings.workers, max_retries=RETRIES)
    watched = _watch_canaries(asked, task, needs)
    judge_one = task(judge_shard)
    done = manifest.rows - sum(shard.rows for shard in missing)
    waiting = deque(missing)
    running: dict[Any, Shard] = {}
    while waiting or running:
        # Bounded, so that a million shards are not a million tasks; two for each place, so that none stands idle.
        while waiting and len(running) < 2 * room:
            shard = waiting.popleft()
            running[judge_one.remote(asked, shard.file, places)] = shard
        ended, _ = ray.wait(list(running))
        for call in ended:
            shard = running.pop(call)
            _outcome(call, f"shard {shard.file}")
            done += shard.rows
            if progress is not None:
                progress(done, manifest.rows)
    return {_outcome(call, "canaries"): file for call, file in watched}


def _watch_canaries(asked: Asked, task: Any, needs: dict[str, float]) -> list[tuple[Any, Path]]:
    """They come first, on every node: a verifier that is broken on one of them is known before the end."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    calls = []
    for node in cluster.nodes(needs):
        file = asked.parts / f"canaries-{node}.jsonl"
        # Soft: a node that is lost meanwhile must not hold the others.
        strategy = NodeAffinitySchedulingStrategy(node, soft=True)
        calls.append((task(judge_canaries).options(scheduling_strategy=strategy).remote(asked, file), file))
    return calls


def _outcome(call: Any, what: str) -> Any:
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OaplError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:  # its worker died more often than a worker dies by chance
        reason = " ".join(str(error).split())[:200]
        raise WorkError(f"{what}: the worker that judged it died {RETRIES + 1} times ({reason})") from None


# -- in the workers -----------------------------------------------------------------------------


def judge_shard(asked: Asked, file: str, places: Places) -> None:
    """Leaves `parts/FILE.jsonl`: a line a rollout of the shard, in its order."""
    import numpy as np

    from pipeline.rollouts.schema import ROLLOUTS
    from pipeline.rollouts.tables import key64, parquet_batches

    _check(asked)
    keys, offsets = places

    def cases() -> Iterator[Case]:
        number = 0
        with (asked.parts / _REFERENCES).open("rb") as lines:
            for batch in parquet_batches(asked.rollouts / file, ["prompt_id", "completion"], ROLLOUTS):
                ids = batch[0].to_pylist()
                wanted = key64(ids)
                found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
                lost = keys[found] != wanted
                if lost.any():
                    prompt_id = ids[int(lost.argmax())]
                    raise RequestError(f"{asked.prompts}: no prompt {prompt_id!r}, which a rollout answers")
                for place, completion in zip(offsets[found].tolist(), batch[1].to_pylist(), strict=True):
                    lines.seek(place)
                    task, answer, tests = json.loads(lines.readline())
                    yield Case(str(number), task, completion, answer, tests)
                    number += 1

    _judge(cases(), asked, asked.parts / f"{file}.jsonl")


def judge_canaries(asked: Asked, file: Path) -> str:
    """Leaves a line a canary of the tasks at hand, by its number among all; returns which machine this is."""
    _check(asked)
    cases = (
        Case(str(number), case.task, case.response, case.answer, case.tests)
        for number, (case, _) in enumerate(CANARIES)
        if case.task in asked.versions
    )
    _judge(cases, asked, file)
    return socket.gethostname()


def _check(asked: Asked) -> None:
    node = socket.gethostname()
    if not asked.parts.is_dir():
        raise RequestError(
            f"node {node} does not see {asked.parts.parent}; verdicts go to a folder that all nodes share"
        )
    for task, version in asked.versions.items():
        found = find_verifier(task).version()
        if found != version:
            raise RequestError(
                f"node {node} judges {task} with version {found}, and the driver with {version}; "
                "install the same on all nodes"
            )


def _judge(cases: Iterator[Case], asked: Asked, file: Path) -> None:
    lines: dict[int, str] = {}
    with contextlib.closing(judge(cases, asked.settings)) as verdicts:  # type: ignore[type-var]
        for verdict in verdicts:
            fields = asdict(verdict)
            lines[int(fields.pop("id"))] = json.dumps(fields)
    text = "".join(f"{number} {lines[number]}\n" for number in sorted(lines))
    write_durably(file, text.encode())


# -- and what they have left --------------------------------------------------------------------


def _merged(parts: Path, manifest: Manifest, canaries: dict[str, Path]) -> Numbered:
    first = 0
    for shard in manifest.shards:
        for number, fields in _lines(parts / f"{shard.file}.jsonl"):
            yield first + number, fields
        first += shard.rows
    worst: dict[int, dict[str, Any]] = {}
    for host, file in canaries.items():
        for number, fields in _lines(file):
            if fields["status"] != CANARIES[number][1]:
                worst[number] = {**fields, "detail": f"on {host}: {fields['detail']}"}
            else:
                worst.setdefault(number, fields)
    for number, fields in sorted(worst.items()):
        yield first + number, fields


def _lines(file: Path) -> Numbered:
    with file.open("rb") as lines:
        for line in lines:
            number, _, fields = line.partition(b" ")
            yield int(number), json.loads(fields)
