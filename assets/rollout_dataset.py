"""Asset `rollout_dataset`."""

import dagster as dg

from assets.metadata import Made, table
from assets.resources import RunFolder, step
from assets.rollouts import rollouts
from assets.rounds import GROUP, PREFIX, rounds
from assets.verdicts import verdicts


@dg.asset(
    key_prefix=PREFIX,
    partitions_def=rounds,
    deps=[rollouts, verdicts],
    group_name=GROUP,
    kinds={"parquet", "huggingface"},
)
def rollout_dataset(context: dg.AssetExecutionContext, run_folder: RunFolder) -> Made:
    """The round as a dataset to share: rollouts, verdicts and prompts with a card, Croissant and checksums.

    **Grain:** one folder a round, in the form that the Hugging Face Hub shows. **Source:** `rollouts` and
    `verdicts`, copied byte by byte; the card and the numbers come from what was recorded.
    """
    from pipeline.rollouts.locate import locate
    from pipeline.rollouts.store import read_manifest
    from pipeline.sharing.package import export_dataset

    with step(context, run_folder) as work:
        out = work.run.dataset(work.round)
        numbers = export_dataset(locate(work.run.path, work.round), out, replace=True)
        digest = read_manifest(work.run.rollouts(work.round)).digest
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": numbers["rows"],
                "bytes": size,
                "tokens": numbers["tokens"],
                "by source": table(["source", "groups"], sorted(numbers["sources"].items())),
                "digest": digest,
                "path": dg.MetadataValue.path(str(out)),
                "card": dg.MetadataValue.path(str(out / "README.md")),
            },
            data_version=dg.DataVersion(digest),
        )
