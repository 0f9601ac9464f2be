"""Asset `prompt_set`."""

import dagster as dg

from assets.metadata import Made, column_schema
from assets.resources import RunFolder, step
from assets.rounds import GROUP, PREFIX, open_rounds


@dg.asset(
    key_prefix=PREFIX,
    group_name=GROUP,
    kinds={"parquet"},
    metadata={"dagster/column_schema": column_schema("PROMPTS")},
)
def prompt_set(context: dg.AssetExecutionContext, run_folder: RunFolder) -> Made:
    """All prompts of the run, training and held out.

    **Grain:** one row a prompt; no prompt is in both splits. **Source:** `prompts.train` and `prompts.heldout` of
    the recipe: the embedded tasks, or a JSONL or Parquet file. Made once; the rounds take their prompts from it in
    a seeded shuffle without end.
    """
    from pipeline.prompts.files import iter_prompts
    from pipeline.prompts.sets import build_prompt_set
    from pipeline.storage.durable import sha256_file

    with step(context, run_folder) as work:
        if not work.run.prompts.exists():
            build_prompt_set(work.recipe, work.run.prompts)
        counts: dict[str, int] = {}
        for prompt in iter_prompts(work.run.prompts):
            for part in (prompt.split, f"{prompt.split}: {prompt.source}"):
                counts[part] = counts.get(part, 0) + 1
        digest = sha256_file(work.run.prompts)
        open_rounds(context.instance, 0)
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": counts.get("train", 0) + counts.get("heldout", 0),
                **counts,
                "sha256": digest,
                "path": dg.MetadataValue.path(str(work.run.prompts)),
            },
            data_version=dg.DataVersion(digest),
        )
