"""What a round of learning is asked to do, and what is refused before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.layout import Run
from pipeline.policies.snapshots import Snapshot
from pipeline.recipe import Learning, Recipe
from pipeline.rollouts.locate import Located, locate
from pipeline.rollouts.store import Manifest
from trainer import attention
from trainer.view import View

UNKNOWN = "unknown"
"""What provenance says of imported data where its source recorded nothing."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of learning is asked to do."""

    recipe: Recipe
    data: Located
    policy: Path
    """What learning goes on from."""
    out: Path
    log: Path
    """JSON lines, one an optimizer step; the summary goes beside it as .json."""
    number: int
    behaviour: Path | None = None
    """The snapshot that wrote the newest data, where it is not `policy`, which learned further meanwhile."""

    @property
    def run(self) -> Run | None:
        """The run that the data is a round of, if it is."""
        if self.data.round is None:
            return None
        root = self.data.root.absolute()
        return Run(root.parent.parent, root.name) if root.parent.name == "runs" else None

    @property
    def checkpoints(self) -> Path:
        return self.run.checkpoints(self.number) if self.run else self.out / ".checkpoints"

    def reference(self, place: Located, manifest: Manifest) -> Path:
        """Where a dataset's recomputed log-probabilities are kept."""
        if self.run is not None and place.round is not None:
            return self.run.reference(place.round)
        return self.out / ".reference" / manifest.digest[:16]


def replayed(work: Round) -> list[Located]:
    """The rounds before this one that are learned from again, newest first."""
    wanted = work.recipe.learning.replay_rounds
    if not wanted:
        return []
    if work.data.round is None:
        raise RequestError(f"{work.data.root}: learning.replay_rounds needs a run's folder, which has older rounds")
    older = range(work.data.round - 1, max(-1, work.data.round - 1 - wanted), -1)
    return [locate(work.data.root, number) for number in older]


def refuse_missing_packages(settings: Learning) -> None:
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise RequestError("learning.tensorboard needs the package tensorboard: pip install 'oapl[tensorboard]'")
    attention.refuse_missing(settings)


def refuse_foreign_tokens(parent: Snapshot, view: View, work: Round) -> None:
    for place, manifest in zip(view.places, view.manifests, strict=True):
        data = manifest.provenance.tokenizer_sha256
        if data not in ("", UNKNOWN, parent.tokenizer_sha256):
            raise RequestError(
                f"{work.policy}: its tokenizer ({parent.tokenizer_sha256[:8]}) is not the one that wrote "
                f"{place.root} ({data[:8]}); train the policy that made the data, or one with its tokenizer"
            )


def temperature(view: View, fallback: float) -> float:
    """What the data was sampled at; `fallback` for imported data that does not say.

    Raises RequestError where rounds that are learned from together differ.
    """
    told = (manifest.provenance.sampling.get("temperature", UNKNOWN) for manifest in view.manifests)
    found = {fallback if value == UNKNOWN else float(value) for value in told}
    if len(found) > 1:
        raise RequestError(
            f"{view.places[0].root}: rounds sampled at different temperatures ({', '.join(map(str, sorted(found)))}) "
            "can't be replayed together; lower learning.replay_rounds"
        )
    return found.pop()
