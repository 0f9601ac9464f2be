"""The command line. Its words are a contract; what does the work is imported when a command needs it."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.ending import leave
from pipeline.errors import OaplError, RequestError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.rollouts.locate import Located

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rollout datasets and off-policy training for reasoning models: generate, judge, keep, share, learn.",
)

prompt_files = typer.Typer(no_args_is_help=True, help="Make prompt files of public problem sets.")
app.add_typer(prompt_files, name="prompts")

RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Name of a recipe, or a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a setting of the recipe; repeatable."),
]
RootOption = Annotated[
    str, typer.Option("--root", help="Data folder, or its URL: runs and Dagster's records lie below it.")
]
# Text, since a Path would make s3:/ of s3://.
PolicyOption = Annotated[
    str, typer.Option("--policy", help="Policy in Hugging Face format, or a snapshot: a folder or a URL.")
]
PromptsOption = Annotated[str, typer.Option("--prompts", help="Prompts, JSONL or Parquet; a file or a URL.")]


@app.command()
def run(
    recipe: RecipeOption = "tiny",
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds to have in all.")] = None,
    root: RootOption = "data",
    set: SetOption = None,
) -> None:
    """Make rounds, through Dagster, and show how pass@k went. Goes on where an earlier call stopped."""
    from pipeline.recipe import load_recipe

    load_recipe(recipe or "tiny", _overrides(set, rounds=rounds))  # nonsense is refused before anything starts
    words = ["assets.run_rounds", "--recipe", recipe or "tiny", "--root", root]
    for override in _overrides(set, rounds=rounds):
        words += ["--set", override]
    _become(words)


@app.command()
def ui(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on this machine.")] = 3000,
    root: RootOption = "data",
    recipe: RecipeOption = "tiny",
    set: SetOption = None,
) -> None:
    """Dagster's web UI and daemon: the assets, the rounds made so far, and new ones at a click."""
    from pipeline.recipe import load_recipe

    load_recipe(recipe or "tiny", set or [])
    words = ["assets.running.web", "--port", str(port), "--root", root, "--recipe", recipe or "tiny"]
    for override in set or []:
        words += ["--set", override]
    _become(words)


@app.command()
def generate(
    policy: PolicyOption,
    prompts: PromptsOption,
    out: Annotated[str, typer.Option("--out", help="Folder or URL of the rollouts; gone on with where it has some.")],
    samples: Annotated[int | None, typer.Option("--samples", min=2, help="Completions a prompt.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1)] = None,
    round: Annotated[int, typer.Option("--round", min=0, help="Number written on each row.")] = 0,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
) -> None:
    """Sample completions of each prompt with vLLM into a Parquet dataset.

    With --set generation.engine=ray on a Ray cluster: that of RAY_ADDRESS, else one of this machine's cores.
    """
    given = {"samples": samples, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    overrides = [f"generation.{key}={value}" for key, value in given.items() if value is not None]
    settings = _settings(recipe, [*_overrides(set, seed=seed), *overrides])

    from pipeline.generation.batch import Work
    from pipeline.generation.generate import generate as make
    from pipeline.generation.vllm_engine import VllmEngine
    from pipeline.policies.fetch import fetch_policy
    from pipeline.prompts.fetch import fetch_prompts, put_prompts
    from pipeline.prompts.files import PromptFile
    from pipeline.storage.places import is_url

    asked = PromptFile(fetch_prompts(prompts))
    _require(policy)
    here = fetch_policy(policy)
    origin = policy if is_url(policy) else None
    work = Work(here, settings.generation, round, settings.seed, settings if recipe else None, origin)
    totals = make(work, asked, out, partial(VllmEngine, here, settings.generation, settings.seed))
    put_prompts(out, asked)
    typer.echo(
        f"{out}: {totals.completions:,} completions in {totals.groups:,} groups, {totals.tokens:,} tokens, "
        f"{totals.seconds:.1f} s" + (f"; {totals.skipped_groups:,} groups were there" if totals.skipped_groups else "")
    )


@app.command()
def verify(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.jsonl",
            help="A case a line: id, task, response, answer or tests; or a folder or URL of rollouts.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where verdicts go, .jsonl or .parquet; a folder's go into it.")
    ] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
) -> None:
    """Judge answers and programs. Needs no model."""
    settings = _settings(recipe, set or [])
    from pipeline.storage.places import is_url, without_scheme

    file = without_scheme(file)
    if is_url(file) or Path(file).is_dir():
        counts, place = _verify_rollouts(file, settings)
    elif out is None:
        raise RequestError("verify needs --out, a .jsonl or .parquet file for the verdicts")
    else:
        from pipeline.verifiers.command import verify_file

        counts, place = verify_file(Path(file), out, settings.verification), str(out)
    words = "".join(f", {count:,} {name}" for name, count in sorted(counts.items()))
    typer.echo(f"{place}: {sum(counts.values()):,} verdicts{words}")


@app.command()
def train(
    rollouts: Annotated[str, typer.Option("--rollouts", help="A run's folder, generated rollouts, or a dataset.")],
    policy: PolicyOption,
    out: Annotated[str, typer.Option("--out", help="Folder or URL below which the new snapshot is published.")],
    round: Annotated[
        int | None, typer.Option("--round", min=0, help="Round of a run's folder; its newest unless given.")
    ] = None,
    behaviour_policy: Annotated[
        str | None,
        typer.Option(
            "--behaviour-policy", help="The snapshot that wrote the rollouts, where --policy has learned on since."
        ),
    ] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
) -> None:
    """Learn from stored rollouts with DeepSpeed and publish the next snapshot. Needs no engine."""
    settings = _settings(recipe, set or [])
    _require(policy)

    from pipeline.sharing.bring import bring
    from pipeline.storage.places import without_scheme
    from pipeline.storage.working_copy import working_folder

    found = bring(without_scheme(rollouts), round)
    if found.verdicts is None:
        counts, place = _judge_here(found, settings)
        typer.echo(f"{place}: {sum(counts.values()):,} verdicts")
    words = ["trainer", "--rollouts", str(found.root), "--policy", policy, "--out", out]
    if found.round is not None:
        words += ["--round", str(found.round)]
    if behaviour_policy is not None:
        _require(behaviour_policy)
        words += ["--behaviour-policy", behaviour_policy]
    settings_file = working_folder(out) / ".recipe.yaml"
    settings_file.parent.mkdir(parents=True, exist_ok=True)
    settings.save(settings_file)
    _become([*words, "--recipe", str(settings_file)])


@app.command()
def evaluate(
    policy: PolicyOption,
    prompts: PromptsOption,
    out: Annotated[str, typer.Option("--out", help="Parquet file or its URL, a row a prompt.")],
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Completions a prompt.")] = None,
    ks: Annotated[str | None, typer.Option("--ks", help="Values of k, such as 1,8,64.")] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
) -> None:
    """pass@k of a policy on held-out prompts."""
    overrides = list(set or [])
    if samples is not None:
        overrides.append(f"evaluation.samples={samples}")
    if ks is not None:
        overrides.append(f"evaluation.ks=[{ks}]")
    elif samples is not None and not any(item.startswith("evaluation.ks") for item in overrides):
        overrides.append(f"evaluation.ks=[{','.join(str(k) for k in (1, 8, 16, 64) if k <= samples)}]")
    settings = _settings(recipe, overrides)
    _require(policy)

    from pipeline.evaluation.pass_at_k import evaluate_to, heldout
    from pipeline.generation.vllm_engine import VllmEngine
    from pipeline.policies.fetch import fetch_policy
    from pipeline.prompts.fetch import fetch_prompts
    from pipeline.prompts.files import iter_prompts

    here = fetch_policy(policy)
    start = partial(VllmEngine, here, settings.for_evaluation(), settings.seed)
    found = evaluate_to(out, here, heldout(iter_prompts(fetch_prompts(prompts))), settings, start)
    for k, estimate in found.overall.items():
        typer.echo(f"pass@{k} {estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
    typer.echo(f"{out}: {found.prompts:,} prompts, {found.samples} completions each, {found.seconds:.1f} s")


@app.command()
def compare(
    out: Annotated[Path, typer.Option("--out", help="Folder of the comparison; gone on with where it has some cells.")],
    loss: Annotated[str | None, typer.Option("--loss", help="Losses, such as oapl,grpo.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME:KEY=VALUE,...",
            help="learning.* settings of a loss, or of one more thing to compare; repeatable.",
        ),
    ] = None,
    lag: Annotated[str, typer.Option("--lag", help="Optimizer steps between snapshots, such as 8,64.")] = "64",
    seeds: Annotated[str, typer.Option("--seeds", help="Such as 0,1,2.")] = "0",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps in all; one round unless given.")
    ] = None,
    recipe: RecipeOption = None,
    rollouts: Annotated[
        Path | None,
        typer.Option("--rollouts", help="A run's folder: learn from one of its rounds, sample no new ones."),
    ] = None,
    round: Annotated[int, typer.Option("--round", min=0, help="Round of --rollouts.")] = 0,
    set: SetOption = None,
) -> None:
    """Run one recipe under several losses, lags and seeds, side by side: one table of measurements, and pictures."""
    from pipeline.comparison import grid

    compared = grid.arms(loss, variant or [])
    chosen = grid.numbers(seeds, "--seeds", 0)
    if rollouts is not None:
        from pipeline.sharing.bring import bring

        bring(rollouts, round)
        data = grid.Stored(rollouts, round)
        cells = grid.stored(recipe or str(rollouts / "recipe.yaml"), set or [], compared, chosen)
    else:
        lags, data = grid.numbers(lag, "--lag", 1), None
        cells = grid.fresh(recipe or "tiny", set or [], compared, lags, chosen, steps or max(lags))

    from pipeline.comparison import run as comparison
    from pipeline.comparison.show import show
    from pipeline.comparison.stages import Children

    with comparison.alone(out) as lock:
        try:
            comparison.compare(cells, out, Children(lock), partial(typer.echo, err=True), data)
        finally:
            show(out)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a YAML file.")],
    set: SetOption = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Cards there are.")] = None,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", help="GiB of a card; judges what fits.")] = None,
    mean_tokens: Annotated[float | None, typer.Option("--mean-tokens", help="Mean length of a completion.")] = None,
    uniform_share: Annotated[
        float | None, typer.Option("--uniform-share", help="Share of groups whose rewards will all be equal.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option("--tokens-per-second", help="Completion tokens that one engine makes.")
    ] = None,
    train_tokens_per_second: Annotated[
        float | None,
        typer.Option("--train-tokens-per-second", help="Completion tokens that all ranks together learn from."),
    ] = None,
    verdicts_per_second: Annotated[
        float | None, typer.Option("--verdicts-per-second", help="Completions that the verifiers judge.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option("--model-config", help="The model's folder, or its config.json.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", help="A run's folder to take lengths and throughputs from, and to compare with."),
    ] = None,
    root: Annotated[Path, typer.Option("--root", help="Data folder that the run lies in.")] = Path("data"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object instead.")] = False,
) -> None:
    """What a recipe takes: tokens, hours, memory and disk, each with its formula; and what to change. Runs nothing."""
    from dataclasses import asdict, replace

    from pipeline.layout import Run
    from pipeline.planning.arithmetic import plan as make
    from pipeline.planning.measured import compare, finished_rounds, given_by, open_measured
    from pipeline.planning.terms import Given
    from pipeline.policies.shapes import shape_of
    from pipeline.recipe import load_recipe

    settings = load_recipe(recipe, set or [])
    run = open_measured(measured) if measured else Run(root, settings.name)
    facts = finished_rounds(run) if run.recipe.exists() else []
    if measured and not facts:
        raise RequestError(f"{measured}: no round of it is finished, so there is nothing to measure by")
    told: dict[str, Any] = {
        "mean_tokens": mean_tokens,
        "evaluation_tokens": mean_tokens,
        "uniform": uniform_share,
        "tokens_per_second": tokens_per_second,
        "evaluation_tokens_per_second": tokens_per_second,
        "train_tokens_per_second": train_tokens_per_second,
        "verdicts_per_second": verdicts_per_second,
        "gpus": gpus,
        "gpu_memory": gpu_memory,
    }
    known = given_by(facts, str(run.path), settings) if facts else Given()
    given = replace(known, **{name: value for name, value in told.items() if value is not None})
    made = make(settings, shape_of(settings, model_config), given)
    compared = compare(run, facts) if facts else []
    if as_json:
        import json

        tree = {**made.as_dict(), "given": asdict(given), "measured": [asdict(item) for item in compared]}
        typer.echo(json.dumps(tree, indent=1))
        return
    from rich.console import Console

    from pipeline.planning.tables import show

    show(made, given, compared, Console())


@prompt_files.command("import")
def import_prompts(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FILE...", help="As published: .jsonl, .jsonl.gz or .parquet. NAME is the prompts' source."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Prompt file to write, .parquet.")],
    kind: Annotated[str, typer.Option("--kind", help="math, deepcoder, livecodebench, apps, taco, humaneval or mbpp.")],
    heldout: Annotated[bool, typer.Option("--heldout", help="Mark the prompts as held out.")] = False,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out records that can't be used.")] = False,
) -> None:
    """Turn downloaded rows of public problem sets into one file of prompts."""
    from pipeline.prompts.problem_sets import import_prompts as convert

    if out.suffix != ".parquet":
        raise RequestError(f"{out}: prompts are written as .parquet")
    skipped: list[str] | None = [] if skip else None
    pairs = [_named(item) for item in files]
    counts = convert(kind, pairs, out, "heldout" if heldout else "train", skipped)
    typer.echo(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if skipped:
        typer.echo(f"{len(skipped):,} records left out, the first: {skipped[0]}", err=True)


def _named(item: str) -> tuple[str, Path]:
    """`NAME=FILE`, or a file whose name without suffixes is the source's."""
    name, equals, file = item.partition("=")
    return (name, Path(file)) if equals and not Path(item).exists() else (Path(item).name.partition(".")[0], Path(item))


def _settings(recipe: str | None, overrides: list[str]) -> Recipe:
    """The recipe that was named, else plain defaults, with the overrides applied."""
    from pipeline.recipe import RECIPES, load_recipe

    return load_recipe(recipe or str(RECIPES / "defaults.yaml"), overrides)


def _overrides(given: list[str] | None, **flags: int | None) -> list[str]:
    return [*(given or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]


def _verify_rollouts(place: str, settings: Recipe) -> tuple[dict[str, int], str]:
    """Judges a folder's or a URL's rollouts; verdicts go beside them. Returns the statuses and where they went."""
    from pipeline.rollouts.mirror import verdicts_copy
    from pipeline.sharing.bring import bring
    from pipeline.storage.places import is_url

    found = bring(place)
    copy = verdicts_copy(found)
    if copy is None and is_url(place):
        raise RequestError(f"{place}: an exported dataset stays as it is; import it, and judge the folder")
    if copy is None:
        return _judge(found, settings, found.verdict_folder), str(found.verdict_folder)
    copy.bring(lambda name: "/" not in name)
    counts = _judge(found, settings, copy.folder)
    copy.send(lambda name: "/" not in name)
    return counts, copy.url


def _judge_here(found: Located, settings: Recipe) -> tuple[dict[str, int], str]:
    """Verdicts for rollouts that have none yet, where `bring` finds them; nothing is sent to a URL."""
    import shutil

    from pipeline.rollouts.mirror import verdicts_copy

    copy, place = verdicts_copy(found), found.verdict_folder
    if copy is None:
        return _judge(found, settings, place), str(place)
    counts = _judge(found, settings, copy.folder)  # kept there, where the next call finds them judged
    shutil.copytree(copy.folder, place, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    return counts, str(place)


def _judge(found: Located, settings: Recipe, out: Path) -> dict[str, int]:
    from pipeline.scoring.score import score

    if found.prompts is None:
        raise RequestError(f"{found.root}: no prompts.parquet beside the rollouts, so no answers to judge by")
    return score(found.rollouts, found.prompts, out, settings.verification).statuses


def _require(policy: str) -> None:
    """Refuses a missing policy before seconds are spent on imports; one at a URL is brought here."""
    from pipeline.storage.places import is_url

    if is_url(policy):
        from pipeline.policies.fetch import fetch_policy

        fetch_policy(policy)
    elif not (Path(policy) / "config.json").exists():
        raise RequestError(f"no policy in {policy}: expected a folder with config.json, weights and tokenizer")


def _become(words: list[str]) -> None:
    """Replaces this process by `python -m words...`, so that signals reach what does the work."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *words])


def _with_rollouts() -> typer.Typer:
    """The `oapl rollouts` commands are imported when one of them is asked for."""
    if "rollouts" in sys.argv[1:2] or "--help" in sys.argv[1:2] or len(sys.argv) == 1:
        from pipeline.cli.rollouts import app as rollouts

        app.add_typer(rollouts, name="rollouts")
    return app


def main() -> None:
    """Entry point: runs a command; an error meant for a person becomes one line and its exit code."""
    # Threads that spin while they wait take the core from whoever shares it: on two busy cores a training step
    # was seen to take seven times as long. Set here, since it is read when the first library with threads loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A short spin keeps most of what spinning gains where nobody else wants the core: a step of the cold start took
    # 0.165 s with it, 0.163 s always spinning, and 0.193 s without.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        _with_rollouts()()
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("oapl: interrupted; what was committed is kept, run the same command to go on\n")
        sys.exit(130)
    except SystemExit as end:
        if "vllm" in sys.modules and end.code in (0, None):
            leave()
        raise


if __name__ == "__main__":
    main()
