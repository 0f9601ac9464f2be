"""Numbers of a dataset in one pass over it: what inspect prints, the card states and the browse page heads with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.rollouts.locate import Located
from pipeline.rollouts.store import Manifest, group_starts, iter_batches, read_manifest
from pipeline.rollouts.tables import STATUS_NAMES, UNKNOWN_PROMPT, VerdictIndex, prompt_facts

COLUMNS = ("rollout_id", "prompt_tokens", "completion_tokens", "logprobs", "completion", "finish_reason")
_LENGTH_EDGES = np.unique(np.concatenate([[0, 1], np.round(2 ** np.arange(1, 21.01, 0.125)).astype(np.int64)]))
"""Bins of at most 9 % width: quantiles of the lengths of any number of rows, in a fixed 160 counters."""


@dataclass(slots=True)
class Lengths:
    """Distribution of completion lengths in tokens."""

    counts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(len(_LENGTH_EDGES), np.int64))
    total: int = 0
    longest: int = 0

    def add(self, lengths: np.ndarray[Any, Any]) -> None:
        self.total += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        bins = np.searchsorted(_LENGTH_EDGES, lengths, side="right") - 1
        self.counts += np.bincount(bins, minlength=len(_LENGTH_EDGES))

    def quantile(self, share: float) -> int:
        """Length below which `share` of the completions lie, to the width of a bin."""
        if not self.counts.sum():
            return 0
        place = int(np.searchsorted(np.cumsum(self.counts), share * self.counts.sum()))
        return int(min(_LENGTH_EDGES[place], self.longest))

    def histogram(self, bins: int = 12) -> list[tuple[int, int, int]]:
        """(from, to, completions) in steps of equal ratio."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return []
        parts = np.array_split(np.arange(used[0], used[-1] + 1), min(bins, used[-1] - used[0] + 1))
        last = len(_LENGTH_EDGES) - 1
        return [
            (int(_LENGTH_EDGES[p[0]]), int(_LENGTH_EDGES[min(p[-1] + 1, last)]) - 1, int(self.counts[p].sum()))
            for p in parts
        ]


@dataclass(slots=True)
class Statistics:
    rows: int = 0
    groups: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    bytes: int = 0
    lengths: Lengths = field(default_factory=Lengths)
    statuses: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    rewards: Counter[float] = field(default_factory=Counter)
    """Rows by reward, rounded to 0.1."""
    reward_sum: float = 0.0
    scored: int = 0
    """Rows with a reward."""
    pass_rates: Counter[int] = field(default_factory=Counter)
    """Groups by mean reward, in tenths."""
    judged_groups: int = 0
    """Groups with at least one reward."""
    uniform_groups: int = 0
    """Judged groups whose rewards are all equal: their advantages are 0."""
    logprob_sum: float = 0.0
    logprob_tokens: int = 0
    without_logprobs: int = 0
    """Rows whose behaviour log-probabilities must be recomputed before learning."""

    @property
    def tokens(self) -> int:
        return self.lengths.total

    @property
    def reward_mean(self) -> float | None:
        return self.reward_sum / self.scored if self.scored else None

    @property
    def uniform_rate(self) -> float | None:
        return self.uniform_groups / self.judged_groups if self.judged_groups else None

    @property
    def logprob_mean(self) -> float | None:
        """Mean behaviour log-probability, nats a token: minus the entropy of the data per token, as sampled."""
        return self.logprob_sum / self.logprob_tokens if self.logprob_tokens else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counters as plain objects, lengths as quantiles."""
        tree: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            tree[part.name] = dict(sorted(value.items())) if isinstance(value, Counter) else value
        tree["lengths"] = {
            "mean": self.tokens / self.rows if self.rows else 0.0,
            **{f"p{round(100 * share)}": self.lengths.quantile(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95)},
            "max": self.lengths.longest,
        }
        tree |= {"tokens": self.tokens, "reward_mean": self.reward_mean, "uniform_rate": self.uniform_rate}
        return tree | {"logprob_mean": self.logprob_mean}


def statistics(place: Located, manifest: Manifest | None = None) -> Statistics:
    """One pass over rollouts, verdicts and prompts. Memory: 13 bytes a verdict, and one row group."""
    manifest = manifest or read_manifest(place.rollouts)
    verdicts, facts = VerdictIndex(place.verdicts), prompt_facts(place.prompts)
    result = Statistics(bytes=sum(shard.bytes for shard in manifest.shards))
    seen = set[str]()
    for batch in iter_batches(place.rollouts, [*COLUMNS, "snapshot_id", "round", "prompt_id"]):
        _add_rows(result, batch)
        statuses, rewards = verdicts.lookup(batch["rollout_id"].to_pylist())
        result.statuses.update(STATUS_NAMES[code] for code in statuses.tolist())
        scored = rewards[~np.isnan(rewards)]
        result.scored += len(scored)
        result.reward_sum += float(scored.sum(dtype=np.float64))
        result.rewards.update(np.round(scored.astype(np.float64), 1).tolist())
        starts = group_starts(batch)
        prompt_ids = batch["prompt_id"].take(pa.array(starts)).to_pylist()
        for prompt_id, part in zip(prompt_ids, np.split(rewards, starts[1:]), strict=True):
            fact = facts.get(prompt_id, UNKNOWN_PROMPT)
            result.tasks[fact.task] += 1
            result.sources[fact.source] += 1
            known = part[~np.isnan(part)]
            if len(known):
                result.judged_groups += 1
                result.uniform_groups += bool(known.min() == known.max())
                result.pass_rates[int(min(10, max(0, round(10 * float(known.mean())))))] += 1
        seen.update(prompt_ids)
        result.groups += len(starts)
    result.prompts = len(seen)
    return result


def _add_rows(result: Statistics, batch: pa.RecordBatch) -> None:
    result.rows += batch.num_rows
    result.prompt_tokens += len(pc.list_flatten(batch["prompt_tokens"]))
    result.lengths.add(pc.list_value_length(batch["completion_tokens"]).to_numpy(zero_copy_only=False))
    result.finish_reasons.update(batch["finish_reason"].to_pylist())
    values = pc.list_flatten(batch["logprobs"])
    result.logprob_tokens += len(values)
    result.logprob_sum += pc.sum(values).as_py() or 0.0
    result.without_logprobs += batch["logprobs"].null_count
