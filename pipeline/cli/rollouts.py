"""`oapl rollouts ...`: look at rollout datasets, check them, share them, cut and join them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Look at rollout datasets, check them, share them, cut and join them.")

Place = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="A run's folder, what `oapl generate --out` left, an exported dataset, or a URL."
    ),
]
Round = Annotated[int | None, typer.Option("--round", help="Round of a run's folder; its newest unless given.", min=0)]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")]
Licence = Annotated[
    str, typer.Option("--license", help="Licence for the card, as the Hub spells it, such as apache-2.0.")
]
Title = Annotated[str | None, typer.Option("--title", help="Name of the dataset on its card.")]
TokenizerDir = Annotated[
    Path | None, typer.Option("--tokenizer", help="Folder of the policy whose tokenizer made the token ids.")
]


class Format(StrEnum):
    """Forms that rollouts come in and go out as."""

    oapl = "oapl"
    official = "official"
    verl = "verl"
    trl = "trl"
    jsonl = "jsonl"


class Keep(StrEnum):
    """What of a group a condition on single rollouts keeps."""

    any = "any"
    all = "all"
    rows = "rows"


class DedupeBy(StrEnum):
    """What counts as the same."""

    prompt = "prompt"
    completion = "completion"


def _say(text: str) -> None:
    typer.echo(text)


def _wrote(out: Path, numbers: dict[str, Any]) -> None:
    _say(f"{out}: {numbers['rows']:,} rollouts in {numbers['groups']:,} groups, {numbers['tokens']:,} tokens")


@app.command()
def inspect(
    place: Place,
    round: Round = None,
    samples: Annotated[int, typer.Option("--samples", help="Groups to show, drawn at random.", min=0)] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Which groups are drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object instead.")] = False,
) -> None:
    """Print counts, lengths, rewards, verdicts, provenance, and sample groups side by side."""
    from pipeline.sharing.bring import bring

    located = bring(place, round)
    if as_json:
        import json

        from pipeline.rollouts.statistics import statistics
        from pipeline.rollouts.store import read_manifest

        manifest = read_manifest(located.rollouts)
        origin = manifest.provenance.model_dump(mode="json")
        numbers = statistics(located, manifest).as_dict()
        _say(json.dumps({**numbers, "digest": manifest.digest, "provenance": origin}))
        return
    from rich.console import Console

    from pipeline.sharing.inspect import show

    show(located, Console(), samples, seed)


@app.command()
def validate(
    place: Place,
    round: Round = None,
    policy: TokenizerDir = None,
    limit: Annotated[int, typer.Option("--limit", help="Stop after this many problems.", min=1)] = 100,
) -> None:
    """Check a dataset to the byte; where it is not sound: exit code 1, a line a problem, with shard and row group."""
    from itertools import islice

    from pipeline.rollouts.store import read_manifest
    from pipeline.rollouts.validate import decoder
    from pipeline.rollouts.validate import validate as check
    from pipeline.sharing.bring import bring

    located = bring(place, round)
    manifest = read_manifest(located.rollouts)
    decode = decoder(located, policy, manifest)
    found = 0
    for problem in islice(check(located, decode), limit):
        found += 1
        typer.echo(str(problem), err=True)
    if found:
        more = " or more" if found == limit else ""
        typer.echo(f"{located.rollouts}: {found}{more} problems", err=True)
        raise typer.Exit(1)
    texts = "texts too" if decode else "texts not compared: no tokenizer at hand"
    _say(f"{located.rollouts}: sound; {manifest.rows:,} rollouts in {len(manifest.shards)} shards ({texts})")


@app.command()
def export(
    place: Place,
    out: Out,
    round: Round = None,
    form: Annotated[Format, typer.Option("--format", help="oapl: a complete Hugging Face dataset.")] = Format.oapl,
    licence: Licence = "unknown",
    title: Title = None,
) -> None:
    """Write a dataset to share: Parquet, card, Croissant and checksums; or the columns of another project."""
    from pipeline.sharing.bring import bring

    located = bring(place, round)
    if form is Format.oapl:
        from pipeline.sharing.package import export_dataset

        _wrote(out, export_dataset(located, out, licence=licence, title=title))
        return
    from pipeline.sharing.exchange.exporting import export_foreign

    _say(f"{out}: {export_foreign(located, out, form.value):,} rollouts as {form.value}")


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, fsspec URL, hf://datasets/OWNER/NAME, or file.")
    ],
    out: Out,
    form: Annotated[Format, typer.Option("--format", help="Form of SOURCE; others than oapl are files.")] = Format.oapl,
    tokenizer: TokenizerDir = None,
    task: Annotated[str, typer.Option("--task", help="Task of rows that do not say: math or code.")] = "math",
    licence: Licence = "unknown",
) -> None:
    """Take in a shared dataset, verified before it becomes visible, or another project's rollouts."""
    if form is Format.oapl:
        from pipeline.sharing.package import import_dataset

        _say(f"{out}: {import_dataset(source, out):,} rollouts, verified")
        return
    from pipeline.sharing.exchange.importing import import_foreign

    _wrote(out, import_foreign(Path(source), out, form.value, tokenizer=tokenizer, task=task, licence=licence))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An exported dataset.")],
    to: Annotated[str, typer.Option("--to", help="Folder, fsspec URL (s3://...), or hf://datasets/OWNER/NAME.")],
) -> None:
    """Copy an exported dataset to a folder, an object store, or the Hub."""
    from pipeline.sharing.package import push_dataset

    _say(f"{to}: {push_dataset(folder, to):,} bytes")


@app.command()
def browse(
    place: Place,
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")] = Path("rollouts.html"),
    round: Round = None,
    policy: TokenizerDir = None,
    limit: Annotated[int, typer.Option("--limit", help="Most rollouts on the page.", min=1)] = 20_000,
    mebibytes: Annotated[int, typer.Option("--size", help="Largest page, in MiB.", min=1)] = 64,
) -> None:
    """Write one HTML file, which needs no server, to read groups in: filter, compare, shade by log-probability."""
    from pipeline.sharing.bring import bring
    from pipeline.sharing.browse import write_page

    shown, total = write_page(bring(place, round), out, policy=policy, most_rollouts=limit, most_bytes=mebibytes << 20)
    _say(f"{out}: {shown:,} of {total:,} groups")


@app.command("filter")
def filter_(
    place: Place,
    out: Out,
    round: Round = None,
    min_pass_rate: Annotated[
        float | None, typer.Option("--min-pass-rate", help="Least mean reward.", min=0, max=1)
    ] = None,
    max_pass_rate: Annotated[float | None, typer.Option("--max-pass-rate", help="Greatest one.", min=0, max=1)] = None,
    drop_uniform: Annotated[bool, typer.Option("--drop-uniform", help="Drop groups of equal rewards.")] = False,
    task: Annotated[list[str] | None, typer.Option("--task", help="Keep these tasks.")] = None,
    status: Annotated[list[str] | None, typer.Option("--status", help="Rollouts with these statuses.")] = None,
    min_tokens: Annotated[
        int | None, typer.Option("--min-tokens", help="Rollouts of at least that length.", min=0)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="And at most.", min=0)] = None,
    where: Annotated[
        str | None, typer.Option("--where", help="SQL condition on a rollout, as polars reads it.")
    ] = None,
    keep: Annotated[
        Keep, typer.Option("--keep", help="Of a group: any rollout fits, all fit, or only the fitting rows.")
    ] = Keep.any,
    licence: Licence = "unknown",
) -> None:
    """Keep the groups that fit: pass rate (as KARL does), task, status, length, or an SQL condition."""
    from pipeline.sharing.bring import bring
    from pipeline.sharing.cut import Conditions, filter_dataset

    conditions = Conditions(
        min_pass_rate=min_pass_rate,
        max_pass_rate=max_pass_rate,
        drop_uniform=drop_uniform,
        tasks=tuple(task or ()),
        statuses=tuple(status or ()),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        where=where,
        keep=keep.value,
    )
    _wrote(out, filter_dataset(bring(place, round), out, conditions, licence=licence))


@app.command()
def merge(
    places: Annotated[list[str], typer.Argument(metavar="DIR...", help="Datasets with the same tokenizer.")],
    out: Out,
    licence: Licence = "unknown",
) -> None:
    """Join datasets into one; a group that several of them hold is taken once."""
    from pipeline.sharing.bring import bring
    from pipeline.sharing.cut import merge_datasets

    _wrote(out, merge_datasets([bring(place) for place in places], out, licence=licence))


@app.command()
def dedupe(
    place: Place,
    out: Out,
    round: Round = None,
    by: Annotated[
        DedupeBy, typer.Option("--by", help="One group a prompt (the newest), or one row a completion.")
    ] = DedupeBy.prompt,
    licence: Licence = "unknown",
) -> None:
    """Keep one group a prompt, or one row of equal completions."""
    from pipeline.sharing.bring import bring
    from pipeline.sharing.cut import dedupe_dataset

    _wrote(out, dedupe_dataset(bring(place, round), out, by=by.value, licence=licence))


@app.command()
def split(
    place: Place,
    out: Out,
    share: Annotated[float, typer.Option("--heldout", help="Share of prompts that are held out.", min=0, max=1)] = 0.1,
    round: Round = None,
    seed: Annotated[int, typer.Option("--seed", help="Which prompts are held out.")] = 0,
    licence: Licence = "unknown",
) -> None:
    """Split by prompt into OUT/train and OUT/heldout, so that no prompt is in both."""
    from pipeline.sharing.bring import bring
    from pipeline.sharing.cut import split_dataset

    for name, numbers in split_dataset(bring(place, round), out, share=share, seed=seed, licence=licence).items():
        _wrote(out / name, numbers)
