"""The card of a shared dataset and its Croissant description, made from what was recorded and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from pipeline.rollouts.schema import PROMPTS, ROLLOUTS, SCHEMA_VERSION, VERDICTS
from pipeline.rollouts.statistics import Statistics
from pipeline.rollouts.store import Manifest
from pipeline.storage import durable

TABLES: dict[str, pa.Schema] = {"rollouts": ROLLOUTS, "prompts": PROMPTS, "verdicts": VERDICTS}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def tables_of(folder: Path) -> dict[str, list[Path]]:
    """The dataset's tables that are there, and the files of each, in order."""
    files = {name: sorted((folder / name).glob("[!.]*.parquet")) for name in TABLES}
    return {name: paths for name, paths in files.items() if paths}


def write_card(folder: Path, manifest: Manifest, numbers: Statistics, licence: str, title: str) -> None:
    """Writes README.md of an exported dataset. `licence` is an identifier of the Hub, such as apache-2.0."""
    tables = tables_of(folder)
    front = {
        "license": licence,
        "pretty_name": title,
        "tags": ["oapl", "rollouts", "reinforcement-learning", "reasoning"],
        "size_categories": [next((name for limit, name in _SIZES if numbers.rows < limit), "1M<n<10M")],
        "configs": [
            {
                "config_name": name,
                "data_files": f"{name}/*.parquet",
                **({"default": True} if name == "rollouts" else {}),
            }
            for name in tables
        ],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _summary(manifest, numbers),
        _warnings(manifest, numbers),
        "## Load it\n\n" + _loading(),
        "## What is in it\n\n" + _numbers(numbers),
        "## Where it comes from\n\n" + _provenance(manifest),
        _recipe(manifest),
        "## Columns\n\n" + _columns(tables),
        "## Check it\n\n`sha256sum -c SHA256SUMS` compares every file; `oapl rollouts validate .` looks inside.",
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _summary(manifest: Manifest, numbers: Statistics) -> str:
    origin = manifest.provenance
    per_group = f"{manifest.samples} a prompt" if manifest.samples else "groups of several sizes"
    return (
        f"{numbers.rows:,} completions ({per_group}) of {numbers.prompts:,} prompts, {numbers.tokens:,} tokens, "
        f"sampled from the frozen policy `{origin.snapshot_id}`. "
        + (
            "Token ids are what the engine sampled, each with its behaviour log-probability: a policy can learn from "
            "this off-policy, without the engine that made it."
            if not numbers.without_logprobs
            else ""
        )
    ).strip()


def _warnings(manifest: Manifest, numbers: Statistics) -> str:
    lines = []
    imported = manifest.provenance.imported or {}
    if imported.get("retokenised"):
        lines.append(
            "> **Re-tokenised.** This data came as text; its token ids were made by a tokenizer from that text and may "
            "differ from what was sampled."
        )
    if numbers.without_logprobs:
        lines.append(
            f"> **{numbers.without_logprobs:,} completions have no behaviour log-probabilities.** They are recomputed "
            "with the frozen policy before learning (`learning.behaviour: recomputed`)."
        )
    return "\n>\n".join(lines)


def _loading() -> str:
    return (
        "```python\n"
        "from datasets import load_dataset\n"
        'rollouts = load_dataset("path/to/this/folder", "rollouts", split="train")\n\n'
        "import polars as pl\n"
        'rollouts = pl.scan_parquet("rollouts/*.parquet")\n'
        'prompts, verdicts = pl.scan_parquet("prompts/*.parquet"), pl.scan_parquet("verdicts/*.parquet")\n'
        'rows = rollouts.join(verdicts, on="rollout_id").join(prompts, on="prompt_id").collect()\n'
        "```\n\n"
        "```sh\n"
        "duckdb -c \"select status, count(*) from 'verdicts/*.parquet' group by status\"\n"
        "oapl train --rollouts . --policy POLICY --out OUT\n"
        "```"
    )


def _numbers(numbers: Statistics) -> str:
    lengths = numbers.as_dict()["lengths"]
    rows = [
        ("completions", f"{numbers.rows:,}"),
        ("groups", f"{numbers.groups:,}"),
        ("prompts", f"{numbers.prompts:,}"),
        ("completion tokens", f"{numbers.tokens:,}"),
        (
            "tokens of a completion",
            f"median {lengths['p50']:,}, 95 % below {lengths['p95']:,}, longest {lengths['max']:,}",
        ),
        ("groups by task", _counted(numbers.tasks)),
        ("groups by source", _counted(numbers.sources)),
        ("finish reasons", _counted(numbers.finish_reasons)),
        ("verdicts", _counted(numbers.statuses)),
    ]
    if numbers.reward_mean is not None:
        rows.append(("mean reward", f"{numbers.reward_mean:.3f} over {numbers.scored:,} scored completions"))
    if numbers.uniform_rate is not None:
        rows.append(("groups without variance", f"{numbers.uniform_groups:,} ({numbers.uniform_rate:.1%})"))
    if numbers.logprob_mean is not None:
        rows.append(("mean log-probability", f"{numbers.logprob_mean:.3f} nats a token"))
    if numbers.tokens:
        rows.append(("bytes", f"{numbers.bytes:,} ({numbers.bytes / numbers.tokens:.2f} a completion token)"))
    return _table(("", ""), rows)


def _counted(counter: Any) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common(12)) or "none"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _provenance(manifest: Manifest) -> str:
    tree = manifest.provenance.model_dump(mode="json", exclude={"recipe", "parents", "sampling", "imported"})
    rows = [(key, f"`{value}`") for key, value in tree.items()]
    rows += [(f"sampling.{key}", f"`{value}`") for key, value in manifest.provenance.sampling.items()]
    rows += [(f"imported.{key}", f"`{value}`") for key, value in (manifest.provenance.imported or {}).items()]
    rows += [("schema version", f"`{SCHEMA_VERSION}`"), ("digest", f"`{manifest.digest}`")]
    text = _table(("recorded", "value"), rows)
    if manifest.provenance.parents:
        parents = json.dumps(manifest.provenance.parents, indent=1, ensure_ascii=False)
        text += f"\n\nMade from these datasets:\n\n```json\n{parents}\n```"
    return text


def _recipe(manifest: Manifest) -> str:
    recipe = manifest.provenance.recipe
    if recipe is None:
        return ""
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"


def _columns(tables: dict[str, list[Path]]) -> str:
    rows = [
        (f"{name}.{field.name}", f"`{field.type}`", "may be null" if field.nullable else "")
        for name in tables
        for field in TABLES[name]
    ]
    return (
        _table(("column", "type", ""), rows)
        + "\n\n`rollouts` and `verdicts` join on `rollout_id`, both to `prompts` on `prompt_id`."
    )


_CROISSANT_TYPES = {"int32": "sc:Integer", "int64": "sc:Integer", "float": "sc:Float", "double": "sc:Float"}


def write_croissant(folder: Path, manifest: Manifest, licence: str, title: str) -> None:
    """Writes croissant.json (MLCommons Croissant 1.0): each file with its checksum, each table as a record set."""
    tables = tables_of(folder)
    files = [
        {
            "@type": "cr:FileObject",
            "@id": path.relative_to(folder).as_posix(),
            "name": path.relative_to(folder).as_posix(),
            "contentUrl": path.relative_to(folder).as_posix(),
            "contentSize": f"{path.stat().st_size} B",
            "encodingFormat": "application/x-parquet",
            "sha256": durable.sha256_file(path),
        }
        for paths in tables.values()
        for path in paths
    ]
    sets = [
        {
            "@type": "cr:FileSet",
            "@id": f"{name}-files",
            "name": f"{name}-files",
            "containedIn": [{"@id": path.relative_to(folder).as_posix()} for path in paths],
            "encodingFormat": "application/x-parquet",
            "includes": f"{name}/*.parquet",
        }
        for name, paths in tables.items()
    ]
    tree = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": title,
        "description": f"Rollouts of {manifest.provenance.snapshot_id} with behaviour log-probabilities and verdicts.",
        "license": licence,
        "version": f"{SCHEMA_VERSION}.0.0",
        "distribution": [*files, *sets],
        "recordSet": [_record_set(name) for name in tables],
    }
    (folder / "croissant.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _record_set(name: str) -> dict[str, Any]:
    fields = []
    for field in TABLES[name]:
        repeated = pa.types.is_list(field.type)
        value = field.type.value_type if repeated else field.type
        fields.append(
            {
                "@type": "cr:Field",
                "@id": f"{name}/{field.name}",
                "name": field.name,
                "dataType": _CROISSANT_TYPES.get(str(value), "sc:Text"),
                **({"repeated": True} if repeated else {}),
                "source": {"fileSet": {"@id": f"{name}-files"}, "extract": {"column": field.name}},
            }
        )
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "field": fields}


_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
