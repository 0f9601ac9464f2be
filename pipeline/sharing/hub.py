"""Datasets on the Hugging Face Hub, `hf://datasets/OWNER/NAME[@REVISION]`, through huggingface_hub."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import RequestError, WorkError

_ADDRESS = re.compile(r"^hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?/?$")


def is_hub(place: str) -> bool:
    return place.startswith("hf://")


def _parse(address: str) -> tuple[str, str | None]:
    match = _ADDRESS.match(address)
    if match is None:
        raise RequestError(f"{address}: not an address on the Hub; it reads hf://datasets/OWNER/NAME[@REVISION]")
    return match["repo"], match["revision"]


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    import httpx
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RepositoryNotFoundError:
        raise RequestError(f"{address}: no such repository, or no right to see it; run `hf auth login`") from None
    except (EntryNotFoundError, RevisionNotFoundError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RequestError(f"{address}: {reason}; give a repository that holds an exported dataset") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise WorkError(f"{address}: {reason}; check the connection and the token, then run again") from error


def push(folder: Path, address: str, names: list[str]) -> int:
    """Commits the named files to the repository in one commit; returns their bytes. A new repository is private."""
    from huggingface_hub import HfApi

    repo, revision = _parse(address)
    with _told(address):
        api = HfApi()
        api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=names,
            # What an older dataset left there must not be taken for this one's.
            delete_patterns=["rollouts/*", "prompts/*", "verdicts/*"],
            revision=revision,
            commit_message="Rollout dataset",
        )
    return sum((folder / name).stat().st_size for name in names)


@contextlib.contextmanager
def reading(address: str) -> Iterator[Callable[[str], Iterator[bytes]]]:
    """`read(file)` streams one file of the repository, all of one revision."""
    from huggingface_hub import HfApi, hf_hub_download

    repo, revision = _parse(address)
    with _told(address):
        commit = HfApi().dataset_info(repo, revision=revision).sha
    with tempfile.TemporaryDirectory(prefix="oapl-hub-") as scratch:

        def read(name: str) -> Iterator[bytes]:
            with _told(f"{address}/{name}"):
                path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_dir=scratch))
            with path.open("rb") as file:
                while block := file.read(4 << 20):
                    yield block
            path.unlink()

        yield read
