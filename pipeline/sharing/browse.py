"""One HTML file to read groups in: no server, no network, and nothing in a completion can act in it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RequestError
from pipeline.rollouts.locate import Located
from pipeline.rollouts.statistics import Statistics, statistics
from pipeline.rollouts.store import Manifest, group_key, iter_batches, read_manifest, split_groups
from pipeline.rollouts.tables import STATUS_NAMES, UNJUDGED, prompt_batches, rows_with, verdict_batches
from pipeline.storage import durable

TEMPLATE = Path(__file__).with_name("browse.html")
NATS_A_STEP = 0.05
"""Log-probabilities go onto the page as a byte a token, in steps of this many nats down to -12.75."""
_TESTS_SHOWN = 2000
_BYTES_A_TOKEN = 8
"""On the page: text, unit number and shade; an estimate, by which the page is made to fit its size."""

Pieces = Callable[[list[int]], list[tuple[str, int]]]
"""Token ids to (text, tokens): pieces that are whole characters, of one token but for cut characters."""


def write_page(
    place: Located, out: Path, *, policy: Path | None = None, most_rollouts: int = 20_000, most_bytes: int = 64 << 20
) -> tuple[int, int]:
    """Writes the page; returns groups on it and groups of the dataset.

    Where not all fit, every n-th group is taken, and the page says so. Shading by log-probability needs the tokenizer:
    that of `policy`, or of the run's snapshot; without it each completion has a strip of shades only.
    """
    manifest = read_manifest(place.rollouts)
    if not manifest.rows:
        raise RequestError(f"{place.rollouts}: no rollouts in it yet; nothing to browse")
    numbers = statistics(place, manifest)
    estimate = _BYTES_A_TOKEN * manifest.tokens + 300 * manifest.rows
    step = max(1, math.ceil(manifest.rows / most_rollouts), math.ceil(estimate / most_bytes))
    page = _Page(pieces_of(place, policy, manifest))
    size = number = rows = 0
    for batch in iter_batches(place.rollouts):
        for group in split_groups(batch):
            fits = size < most_bytes and (not rows or rows + group.num_rows <= most_rollouts)
            if number % step == 0 and fits:
                rows += group.num_rows
                size += page.add(group.to_pylist(), group_key(group))
            number += 1
    page.add_prompts(place)
    page.add_verdicts(place)
    with durable.told_in_one_line(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        durable.write_durably(out, _fill(place, manifest, numbers, page))
    return len(page.groups), number


class _Page:
    """What the page shows, encoded as it comes: tokens are two or four bytes, log-probabilities one."""

    def __init__(self, pieces: Pieces | None) -> None:
        self.groups: list[dict[str, Any]] = []
        self.units: dict[str, int] = {}
        self._pieces = pieces
        self._rows: dict[str, dict[str, Any]] = {}
        self._prompts: dict[str, list[dict[str, Any]]] = {}

    def add(self, rows: list[dict[str, Any]], key: tuple[str, int, str]) -> int:
        """Takes a group; returns about how many bytes it will have on the page."""
        group: dict[str, Any] = {"id": key[2], "snapshot": key[0], "round": key[1], "rows": []}
        size = 200
        for row in rows:
            shown = {
                "id": row["rollout_id"],
                "text": row["completion"],
                "n": len(row["completion_tokens"]),
                "end": row["finish_reason"],
                "status": UNJUDGED,
                "reward": None,
                "detail": "",
                **self._shades(row["completion_tokens"], row["logprobs"]),
            }
            group["rows"].append(shown)
            self._rows[row["rollout_id"]] = shown
            size += 200 + len(row["completion"]) + 4 * shown["n"]
        self.groups.append(group)
        self._prompts.setdefault(key[2], []).append(group)
        return size

    def _shades(self, tokens: list[int], logprobs: list[float] | None) -> dict[str, Any]:
        if logprobs is None:
            return {}
        if self._pieces is None:
            return {"lp": _shade_bytes(np.array(logprobs, np.float32))}
        pieces = self._pieces(tokens)
        units = np.array([self.units.setdefault(text, len(self.units)) for text, _ in pieces], np.uint32)
        starts = np.cumsum([0, *(count for _, count in pieces)])[:-1]
        sums = np.add.reduceat(np.array(logprobs, np.float32), starts) if len(starts) else np.zeros(0, np.float32)
        return {"lp": _shade_bytes(sums), "units": units}

    def add_prompts(self, place: Located) -> None:
        for batch in prompt_batches(place.prompts):
            for prompt in rows_with(batch, "prompt_id", self._prompts):
                tests = prompt["tests"]
                if tests is not None and len(tests) > _TESTS_SHOWN:
                    tests = f"{tests[:_TESTS_SHOWN]} … ({len(tests):,} characters)"
                for group in self._prompts[prompt["prompt_id"]]:
                    group |= {
                        "task": prompt["task"],
                        "source": prompt["source"],
                        "answer": prompt["answer"],
                        "tests": tests,
                    }
                    group["messages"] = [[message["role"], message["content"]] for message in prompt["messages"]]

    def add_verdicts(self, place: Located) -> None:
        columns = ["rollout_id", "verifier", "verifier_version", "status", "reward", "detail", "isolation"]
        codes = {name: code for code, name in enumerate(STATUS_NAMES)}
        for batch in verdict_batches(place.verdicts, columns):
            for verdict in rows_with(batch, "rollout_id", self._rows):
                row = self._rows[verdict["rollout_id"]]
                row |= {"status": codes.get(verdict["status"], UNJUDGED), "reward": verdict["reward"]}
                row["detail"] = verdict["detail"]
                row["by"] = f"{verdict['verifier']} {verdict['verifier_version']}, {verdict['isolation']}"

    def encoded(self) -> tuple[list[dict[str, Any]], int]:
        """Groups ready for JSON, and the bytes of a unit's number."""
        width = 2 if len(self.units) < 1 << 16 else 4
        for row in self._rows.values():
            if "units" in row:
                row["units"] = base64.b64encode(row["units"].astype(f"<u{width}").tobytes()).decode()
        return self.groups, width


def _shade_bytes(logprobs: np.ndarray[Any, Any]) -> str:
    steps = np.clip(np.round(-logprobs / NATS_A_STEP), 0, 255).astype(np.uint8)
    return base64.b64encode(steps.tobytes()).decode()


def _fill(place: Located, manifest: Manifest, numbers: Statistics, page: _Page) -> bytes:
    groups, width = page.encoded()
    origin = manifest.provenance
    title = f"{origin.snapshot_id}, round {origin.round}"
    data = {
        "title": title,
        "numbers": numbers.as_dict(),
        "digest": manifest.digest,
        "origin": origin.model_dump(mode="json", exclude={"recipe", "parents"}),
        "statuses": STATUS_NAMES,
        "step": NATS_A_STEP,
        "units": list(page.units),
        "unit_bytes": width,
        "shaded": bool(page.units),
        "groups": groups,
    }
    # A "<" in a completion must not end the script element: in JSON it may be written as an escape.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    head, middle, tail = template.partition("__DATA__")
    assert middle, "the template has a place for the data"
    return (head.replace("__TITLE__", html.escape(title)) + text + tail).encode()


def pieces_of(place: Located, policy: Path | None, manifest: Manifest) -> Pieces | None:
    """How tokens look as text; None: no tokenizer is at hand. Raises RequestError for a `policy` without one."""
    from tokenizers import Tokenizer

    folder = policy
    if folder is None and place.snapshots is not None:
        folder = place.snapshots / manifest.provenance.snapshot_id
    if folder is None or not (folder / "tokenizer.json").is_file():
        if policy is not None:
            raise RequestError(
                f"{policy}: no tokenizer.json here; give the folder of the policy that made the rollouts"
            )
        return None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    known: dict[int, str] = {}

    def one(token: int) -> str:
        if token not in known:
            word = tokenizer.id_to_token(token) or ""
            # SentencePiece marks a space by this sign, and its decoder drops it at the start of a text.
            known[token] = (
                word.replace("▁", " ") if "▁" in word else tokenizer.decode([token], skip_special_tokens=False)
            )
        return known[token]

    def pieces(tokens: list[int]) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        place_in = 0
        while place_in < len(tokens):
            text, count = one(tokens[place_in]), 1
            # A character of several bytes may be cut into several tokens, none of which is text by itself.
            while "\ufffd" in text and count < 6 and place_in + count < len(tokens):
                count += 1
                text = tokenizer.decode(tokens[place_in : place_in + count], skip_special_tokens=False)
            if "\ufffd" in text:
                text, count = one(tokens[place_in]), 1
            found.append((text, count))
            place_in += count
        return found

    return pieces
