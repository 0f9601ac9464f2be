"""A dataset in a terminal: its numbers, and completions of a few groups side by side with their verdicts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.rollouts.locate import Located
from pipeline.rollouts.statistics import Statistics, statistics
from pipeline.rollouts.store import Manifest, iter_batches, read_manifest, split_groups
from pipeline.rollouts.tables import prompt_batches, rows_with, verdict_batches

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

STATUS_COLOURS = {
    "correct": "green",
    "wrong": "red",
    "no_answer": "yellow",
    "timeout": "magenta",
    "crashed": "magenta",
    "bad_reference": "cyan",
    "refused": "cyan",
    "unjudged": "white",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One group with all that is known of it."""

    prompt_id: str
    prompt: Mapping[str, Any] | None
    """The row of PROMPTS; null where the prompts are not at hand."""
    rollouts: list[dict[str, Any]]
    """Rows of ROLLOUTS, each with its row of VERDICTS under `verdict`, or null there."""


def sample_groups(place: Located, count: int, seed: int = 0) -> list[Sample]:
    """`count` groups drawn at random, in one pass over the rollouts; memory is that of the groups drawn."""
    dice, drawn = random.Random(seed), list[tuple[int, Any]]()
    for number, group in enumerate(_groups(place)):
        # Reservoir sampling (Vitter's algorithm R): each group ends up in the sample with equal probability.
        place_in = number if number < count else dice.randrange(number + 1)
        if place_in < count:
            kept = (number, group.to_pylist())
            drawn[place_in : place_in + 1] = [kept]
    return attach(place, [rows for _, rows in sorted(drawn, key=lambda item: item[0])])


def _groups(place: Located) -> Iterator[Any]:
    for batch in iter_batches(place.rollouts):
        yield from split_groups(batch)


def attach(place: Located, groups: list[list[dict[str, Any]]]) -> list[Sample]:
    """Groups as lists of rows, with their prompts and verdicts; one pass over each of the two tables."""
    prompt_ids = {rows[0]["prompt_id"] for rows in groups}
    rollout_ids = {row["rollout_id"] for rows in groups for row in rows}
    prompts, verdicts = dict[str, Any](), dict[str, Any]()
    for batch in prompt_batches(place.prompts):
        prompts |= {row["prompt_id"]: row for row in rows_with(batch, "prompt_id", prompt_ids)}
    for batch in verdict_batches(place.verdicts):
        verdicts |= {row["rollout_id"]: row for row in rows_with(batch, "rollout_id", rollout_ids)}
    for rows in groups:
        for row in rows:
            row["verdict"] = verdicts.get(row["rollout_id"])
    return [Sample(rows[0]["prompt_id"], prompts.get(rows[0]["prompt_id"]), rows) for rows in groups]


def show(place: Located, console: Console, samples: int = 2, seed: int = 0) -> None:
    """Prints the dataset's numbers, its provenance, and `samples` groups."""
    from rich.columns import Columns

    manifest = read_manifest(place.rollouts)
    numbers = statistics(place, manifest)
    console.print(
        f"[bold]{place.root}[/bold]" + ("" if place.round is None else f"  round {place.round}"), highlight=False
    )
    console.print(_overview(manifest, numbers))
    bars = [
        _bars("completion tokens", [(_span(low, high), rows) for low, high, rows in numbers.lengths.histogram()]),
        _bars("verdicts", numbers.statuses.most_common(), STATUS_COLOURS),
        _bars("groups by pass rate", [(f"{tenth / 10:.1f}", numbers.pass_rates[tenth]) for tenth in range(11)]),
        _bars("finish reasons", numbers.finish_reasons.most_common()),
        _bars("groups by task", numbers.tasks.most_common(8)),
    ]
    console.print(Columns(bars, padding=(1, 3)))
    console.print(_origin(manifest))
    for sample in sample_groups(place, samples, seed):
        console.print(_group(sample, console.width))


def _overview(manifest: Manifest, numbers: Statistics) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    lengths = numbers.as_dict()["lengths"]
    size = f"{numbers.bytes / 2**20:,.1f} MiB in {len(manifest.shards)} shards"
    per_token = f", {numbers.bytes / numbers.tokens:.2f} bytes a token" if numbers.tokens else ""
    group = f"groups of {manifest.samples}" if manifest.samples else "groups of several sizes"
    rows = [
        ("rollouts", f"{numbers.rows:,} in {numbers.groups:,} {group}, of {numbers.prompts:,} prompts"),
        ("tokens", f"{numbers.tokens:,} sampled, {numbers.prompt_tokens:,} of prompts"),
        ("length", f"median {lengths['p50']:,}, 95 % below {lengths['p95']:,}, longest {lengths['max']:,}"),
        ("size", size + per_token),
        ("digest", manifest.digest),
    ]
    if numbers.reward_mean is not None and numbers.uniform_rate is not None:
        rows.insert(3, ("reward", f"mean {numbers.reward_mean:.3f} over {numbers.scored:,} scored"))
        rows.insert(4, ("no variance", f"{numbers.uniform_groups:,} groups ({numbers.uniform_rate:.1%}): advantage 0"))
    if numbers.logprob_mean is not None:
        rows.insert(3, ("log-prob", f"mean {numbers.logprob_mean:.3f} nats a token"))
    if numbers.without_logprobs:
        rows.insert(3, ("log-prob", f"{numbers.without_logprobs:,} rollouts without; recompute before learning"))
    for row in rows:
        table.add_row(f"[dim]{row[0]}[/dim]", row[1])
    return table


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _bars(title: str, rows: list[tuple[str, int]], colours: Mapping[str, str] | None = None) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    most = max((count for _, count in rows), default=0) or 1
    table = Table.grid(padding=(0, 1))
    table.title, table.title_justify = title, "left"
    for name, count in rows:
        colour = (colours or {}).get(name, "blue")
        table.add_row(Text(name, "dim"), Text("█" * round(20 * count / most) or "▏", colour), f"{count:,}")
    return table


def _origin(manifest: Manifest) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    tree = manifest.provenance.model_dump(mode="json", exclude={"recipe", "parents", "sampling", "imported"})
    tree["sampling"] = ", ".join(f"{key} {value}" for key, value in manifest.provenance.sampling.items())
    if manifest.provenance.imported:
        tree["imported"] = ", ".join(f"{key} {value}" for key, value in manifest.provenance.imported.items())
    tree["parents"] = len(manifest.provenance.parents)
    for key, value in tree.items():
        table.add_row(Text(key, "dim"), Text(str(value)))
    return table


def _group(sample: Sample, width: int) -> RenderableType:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    prompt = sample.prompt or {"messages": [], "task": "unknown", "answer": None}
    question = "\n".join(f"{message['role']}: {message['content']}" for message in prompt["messages"])
    head = Text(_shortened(question, 1200))
    if prompt.get("answer") is not None:
        head.append(f"\nreference: {prompt['answer']}", "bold")
    side = max(40, width // min(3, max(1, len(sample.rollouts))) - 2)
    panels = [_completion(row, side) for row in sample.rollouts[:6]]
    left = len(sample.rollouts) - len(panels)
    title = f"prompt {sample.prompt_id}  {prompt['task']}" + (f"  ({left} more completions)" if left else "")
    from rich.console import Group

    return Panel(Group(head, Columns(panels, width=side)), title=Text(title), title_align="left")


def _completion(row: dict[str, Any], width: int) -> RenderableType:
    from rich.panel import Panel
    from rich.text import Text

    verdict = row["verdict"] or {"status": "unjudged", "reward": None, "detail": ""}
    colour = STATUS_COLOURS.get(verdict["status"], "white")
    text = Text(_shortened(row["completion"], 900))
    if verdict["detail"]:
        text.append(f"\n{_shortened(verdict['detail'], 200)}", "italic dim")
    reward = "" if verdict["reward"] is None else f" {verdict['reward']:g}"
    tokens = f"{len(row['completion_tokens'])} tokens, {row['finish_reason']}"
    title = Text(f"{row['sample']}: {verdict['status']}{reward}", colour)
    return Panel(text, title=title, subtitle=Text(tokens, "dim"), border_style=colour, width=width)


def _shortened(text: str, most: int) -> str:
    """Its beginning and its end (there the answer stands), without control characters that would steer the terminal."""
    if len(text) > most:
        text = f"{text[: most // 2]}\n … {len(text) - most:,} characters …\n{text[-most // 2 :]}"
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
