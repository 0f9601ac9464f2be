"""How numbers, tables and pictures are told to Dagster."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import dagster as dg

if TYPE_CHECKING:
    Made: TypeAlias = dg.MaterializeResult[None]
else:
    # Where an asset has checks, Dagster refuses the parametrised form.
    Made = dg.MaterializeResult

TEXT_SHOWN = 600
"""Characters of a prompt or completion that a sample shows."""


def column_schema(name: str) -> dg.TableSchema:
    """Columns of one of the three tables (ROLLOUTS, PROMPTS, VERDICTS)."""
    from pipeline.rollouts import schema

    notes = _notes()
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                str(field.type).replace(" not null", ""),
                description=notes.get((name, field.name)),
                constraints=dg.TableColumnConstraints(nullable=field.nullable),
            )
            for field in getattr(schema, name)
        ]
    )


@functools.cache
def _notes() -> Mapping[tuple[str, str], str]:
    """What the schema module says of each field: the comment above it."""
    from pipeline.rollouts import schema

    found: dict[tuple[str, str], str] = {}
    table, comment = "", list[str]()
    for line in Path(schema.__file__).read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.endswith("= pa.schema("):
            table = text.split()[0]
        elif text.startswith("#"):
            comment.append(text.removeprefix("#").strip())
        elif text.startswith('pa.field("'):
            found[table, text.split('"')[1]] = " ".join(comment)
            comment = [] if not _shares_comment(text) else comment
        else:
            comment = []
    return found


def _shares_comment(line: str) -> bool:
    return '"snapshot_id"' in line or '"prompt_tokens"' in line or '"verifier",' in line


def lineage(columns: Mapping[str, Sequence[tuple[dg.AssetKey, str]]]) -> dg.TableColumnLineage:
    """Which upstream columns each column is made from."""
    return dg.TableColumnLineage(
        {
            name: [dg.TableColumnDep(asset_key=key, column_name=column) for key, column in sources]
            for name, sources in columns.items()
        }
    )


def picture(path: Path) -> dg.MarkdownMetadataValue:
    """A PNG inside the metadata, so that it is seen wherever the event is read."""
    text = base64.b64encode(path.read_bytes()).decode()
    return dg.MetadataValue.md(f"![rounds of the run](data:image/png;base64,{text})")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> dg.MarkdownMetadataValue:
    lines = [head, ["---"] * len(head), *rows]
    return dg.MetadataValue.md("\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines))


def _cell(text: str) -> str:
    short = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " …"
    return short.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")


def samples(run_path: Path, round: int, groups: int = 3, each: int = 3) -> dg.MarkdownMetadataValue:
    """Completions of a few groups drawn at random, with their verdicts."""
    from pipeline.rollouts.locate import locate
    from pipeline.sharing.inspect import sample_groups

    rows = []
    for group in sample_groups(locate(run_path, round), groups, seed=round):
        asked = group.prompt["messages"][-1]["content"] if group.prompt else group.prompt_id
        for row in group.rollouts[:each]:
            verdict = row["verdict"] or {"status": "unjudged", "reward": None, "detail": ""}
            reward = "–" if verdict["reward"] is None else f"{verdict['reward']:g}"
            rows.append([_cell(asked), _cell(row["completion"]), verdict["status"], reward, _cell(verdict["detail"])])
    return table(["prompt", "completion", "status", "reward", "detail"], rows)


def tidy(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same with numbers as a person writes them: six digits of a fraction, where Dagster shows seventeen."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in metadata.items()}


def snapshot_link(snapshot: Any, place: Path) -> dict[str, Any]:
    """Identity of a snapshot and of the one it was trained from."""
    return {
        "snapshot": snapshot.snapshot_id,
        "parent": snapshot.parent or "none: a start",
        "step": snapshot.step,
        "sha256": snapshot.sha256,
        "path": dg.MetadataValue.path(str(place)),
    }
