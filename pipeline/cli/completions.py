"""`oapl generate`: completions of prompts, into a dataset."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from pipeline.cli.options import PolicyOption, PromptsOption, RecipeOption, SetOption, overrides, require, settings_of


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
    told = [f"generation.{key}={value}" for key, value in given.items() if value is not None]
    settings = settings_of(recipe, [*overrides(set, seed=seed), *told])

    from pipeline.generation.batch import Work
    from pipeline.generation.generate import generate as make
    from pipeline.generation.vllm_engine import VllmEngine
    from pipeline.policies.fetch import fetch_policy
    from pipeline.prompts.fetch import fetch_prompts, put_prompts
    from pipeline.prompts.files import PromptFile
    from pipeline.storage.places import is_url

    asked = PromptFile(fetch_prompts(prompts))
    require(policy)
    here = fetch_policy(policy).absolute()
    origin = policy if is_url(policy) else None
    work = Work(here, settings.generation, round, settings.seed, settings if recipe else None, origin)
    totals = make(work, asked, out, partial(VllmEngine, here, settings.generation, settings.seed))
    put_prompts(out, asked)
    typer.echo(
        f"{out}: {totals.completions:,} completions in {totals.groups:,} groups, {totals.tokens:,} tokens, "
        f"{totals.seconds:.1f} s" + (f"; {totals.skipped_groups:,} groups were there" if totals.skipped_groups else "")
    )
