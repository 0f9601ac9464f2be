"""What a run came to so far, read from its files: numbers by round, a picture and a page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.curves import curve
from pipeline.evaluation.plots import draw_rounds
from pipeline.layout import Run, round_key
from pipeline.runs.stages import STAGES, START_EVALUATION, read_stages
from pipeline.scoring.score import read_summary
from pipeline.storage.durable import write_durably

if TYPE_CHECKING:
    from pipeline.evaluation.pass_at_k import Estimate


def entries(run: Run) -> Iterator[dict[str, Any]]:
    """An entry for the start (its `round` is null) and one for each round that was evaluated, oldest first.

    `eval`, `ci` and their forms by task and source are keyed by k as text; `seconds` has the four stages. Rounds
    are read one after another: nothing grows with the rollouts.
    """
    if run.evaluation(None).exists():
        yield _entry(run, None)
    for round in run.rounds():
        if run.evaluation(round).exists():
            yield _entry(run, round)


def _entry(run: Run, round: int | None) -> dict[str, Any]:
    from pipeline.evaluation.pass_at_k import read_evaluation

    found = read_evaluation(run.evaluation(round))
    stages = read_stages(run, round or 0)
    seconds = {stage: stages.get(stage, {}).get("seconds", 0.0) for stage in STAGES}
    if round is None:
        evaluated = stages.get(START_EVALUATION, {}).get("seconds", 0.0)
        seconds = {stage: evaluated if stage == "evaluate" else 0.0 for stage in STAGES}
    return {
        "round": round,
        "snapshot_id": found.snapshot_id,
        "step": found.step,
        "eval": _by_k(found.pass_at),
        "eval_by_task": _means(found.by_task),
        "eval_by_source": _means(found.by_source),
        "ci": _by_k(found.ci),
        "ci_by_task": _intervals(found.by_task),
        "ci_by_source": _intervals(found.by_source),
        "eval_tokens_mean": found.mean_tokens,
        **_training_data(run, round),
        "seconds": seconds,
    }


def _means(parts: dict[str, dict[int, Estimate]]) -> dict[str, dict[str, float]]:
    return {name: _by_k({k: e.mean for k, e in ks.items()}) for name, ks in parts.items()}


def _intervals(parts: dict[str, dict[int, Estimate]]) -> dict[str, dict[str, tuple[float, float]]]:
    return {name: _by_k({k: (e.low, e.high) for k, e in ks.items()}) for name, ks in parts.items()}


def _by_k(values: dict[int, Any]) -> dict[str, Any]:
    return {str(k): value for k, value in values.items()}


def _training_data(run: Run, round: int | None) -> dict[str, Any]:
    from pipeline.rollouts.store import read_manifest

    if round is None:
        return {"generated": 0, "reward_mean": None, "tokens_mean": None}
    manifest = read_manifest(run.rollouts(round))
    scoring = read_summary(run.verdicts(round))
    return {
        "generated": manifest.rows,
        "reward_mean": scoring.reward_mean if scoring else None,
        "tokens_mean": manifest.tokens / manifest.rows if manifest.rows else None,
    }


def write_report(run: Run) -> list[dict[str, Any]]:
    """Writes summary, pictures and page of the run, and returns the summary's entries."""
    found = list(entries(run))
    run.report.mkdir(parents=True, exist_ok=True)
    _replace(run.summary, json.dumps({"rounds": found}, indent=1) + "\n")
    curves = [curve(run, entry["round"]) for entry in found if entry["round"] is not None]
    draw_rounds(found, curves, {run.picture: 1400, run.small_picture: 1050}, title=run.name)
    _replace(run.page, _page(run, found))
    return found


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())


def name_of(round: int | None) -> str:
    return "start" if round is None else round_key(round)


def _page(run: Run, found: list[dict[str, Any]]) -> str:
    ks = list(found[0]["eval"]) if found else []
    tasks = list(found[0]["eval_by_source"]) if found else []
    heads = ["round", "snapshot", "step", *(f"pass@{k}" for k in ks), *(f"pass@1 {task}" for task in tasks)]
    heads += ["reward", "rollouts", *(f"{stage} s" for stage in STAGES)]
    rows = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(entry, ks, tasks))}</tr>" for entry in found)
    links = "".join(
        f'<li>round {round_key(r)}: <a href="../datasets/round={round_key(r)}/README.md">dataset card</a>, '
        f'<a href="../logs/round={round_key(r)}/">logs</a></li>'
        for r in run.rounds()
    )
    return _PAGE.format(
        name=html.escape(run.name),
        heads="".join(f"<th>{html.escape(head)}</th>" for head in heads),
        rows=rows,
        links=links,
    )


def _cells(entry: dict[str, Any], ks: list[str], tasks: list[str]) -> Iterator[str]:
    yield name_of(entry["round"])
    yield f"<code>{html.escape(entry['snapshot_id'])}</code>"
    yield f"{entry['step']:,}"
    for k in ks:
        low, high = entry["ci"][k]
        yield f"{entry['eval'][k]:.3f} <small>[{low:.3f}, {high:.3f}]</small>"
    for task in tasks:
        yield f"{entry['eval_by_source'][task]['1']:.3f}" if "1" in entry["eval_by_source"][task] else "–"
    yield "–" if entry["reward_mean"] is None else f"{entry['reward_mean']:.3f}"
    yield f"{entry['generated']:,}"
    for stage in STAGES:
        yield f"{entry['seconds'][stage]:.1f}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: rounds</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1f2430; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ text-align: right; padding: .35rem .7rem; border-bottom: 1px solid #e3e6ee; white-space: nowrap; }}
th {{ font-weight: 600; }} small {{ color: #6a7184; }} img {{ max-width: 100%; }}
</style></head><body>
<h1>{name}</h1>
<p>pass@k on held-out prompts, unbiased, with 95 % intervals over prompts; reward and rollouts are those the round
learned from. The same numbers are in <a href="summary.json">summary.json</a>.</p>
<table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table>
<p><img src="rounds.png" alt="pass@k, reward, lengths, loss and log-ratio by round"></p>
<ul>{links}</ul>
</body></html>
"""
