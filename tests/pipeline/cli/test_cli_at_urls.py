"""Verdicts sent to URLs, and what a person reads of wrong ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from faulty_proxy import FaultyProxy, asked_for
from rollout_data import group, prompt_name, provenance
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.errors import OaplError
from pipeline.prompts.fetch import put_prompts
from pipeline.prompts.files import make_prompt
from pipeline.rollouts.store import RolloutWriter
from pipeline.scoring import score as scoring
from pipeline.sharing.bring import bring
from pipeline.storage import objects


def write_rollouts(place: str | Path) -> None:
    with RolloutWriter(place, provenance(), samples=4) as writer:
        for number in range(3):
            writer.add_group(group(number))
    prompts = [make_prompt("math", (("user", f"question {n}"),), answer=str(n)) for n in range(3)]
    named = [replace(one, prompt_id=prompt_name(number)) for number, one in enumerate(prompts)]
    put_prompts(place, named)


def verify(place: str | Path) -> OaplError | None:
    found = CliRunner().invoke(app, ["verify", str(place)]).exception
    assert found is None or isinstance(found, OaplError), repr(found)
    return found


def test_verdicts_go_to_the_url_and_half_of_them_are_not_seen(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rollouts(bucket)
    write_rollouts(tmp_path / "disk")
    assert verify(tmp_path / "disk") is None
    proxy.fault_of = lambda method, path: "500" if method == "PUT" and "scoring.json" in path else None
    failed = verify(bucket)
    assert failed is not None and failed.exit_code == 1 and "then run again" in str(failed)
    assert [name for name in objects.Objects(bucket).names("verdicts") if name.endswith(".parquet")]
    assert bring(bucket).verdicts is None
    proxy.fault_of = lambda method, path: None

    def judged_again(*_: object) -> None:
        raise AssertionError("what was judged waits to be sent")

    monkeypatch.setattr(scoring, "judge", judged_again)
    assert verify(bucket) is None
    found = bring(bucket).verdicts
    assert found is not None
    tables = [pl.read_parquet(folder / "*.parquet") for folder in (found, tmp_path / "disk" / "verdicts")]
    assert tables[0].drop("wall_ms").equals(tables[1].drop("wall_ms")) and len(tables[0]) == 12
    asked = asked_for(proxy, "PUT")
    shutil.rmtree(tmp_path / "cache")
    assert verify(bucket) is None  # on another machine, which has nothing to do
    assert asked == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["verify", "s3://bucket/nothing/there"], 2, "s3://bucket/nothing/there"),
        (["verify", "nonsense://x/y"], 2, "nonsense://x/y: Protocol not known"),
        (["train", "--policy", "s3://nobody/p", "--rollouts", "r", "--out", "s3://nobody/o"], 2, "no policy at s3://n"),
        (["evaluate", "--policy", "nonsense://p", "--prompts", "p", "--out", "o"], 2, "nonsense://p: Protocol not kno"),
        (["generate", "--policy", "p", "--prompts", "s3://nobody/p.jsonl", "--out", "o"], 2, "no prompt file s3://nob"),
    ],
)
def test_a_wrong_url_is_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.setattr(objects, "PAUSE_S", 100.0)  # no second try
    found = CliRunner().invoke(app, words).exception
    assert isinstance(found, OaplError), repr(found)
    assert found.exit_code == code and said in str(found) and "\n" not in str(found)
