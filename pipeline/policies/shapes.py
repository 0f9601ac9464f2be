"""How large a model is, by what its config.json says: parameters, activations, key-value cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.recipe import ColdStart, Recipe

GIB = float(1 << 30)
ITEM = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's config.json decides its size."""

    name: str
    kind: str
    """`model_type`: llama, mistral, qwen2 or qwen3."""
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool
    """Embedding and head are one matrix."""
    longest: int | None = None
    """Positions that it was made for, a scaled rotation included."""
    source: str = ""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer: attention, its biases (qwen2) or norms (qwen3), the MLP, two norms."""
        attention = 2 * self.hidden * self.query + 2 * self.hidden * self.key
        extra = {"qwen2": self.query + 2 * self.key, "qwen3": 2 * self.head_dim}.get(self.kind, 0)
        return attention + extra + 3 * self.hidden * self.mlp + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.embedding * (1 if self.tied else 2) + self.layers * self.layer + self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers: rank x (in + out) of each."""
        ends = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key) + 3 * (self.hidden + self.mlp)
        return self.layers * rank * ends

    def activations(self, item: int, flash: bool) -> int:
        """Bytes a token that one layer keeps for the backward pass.

        Counted from what autograd saves: two norms (input, normalised, scaled; the first in float32), query, keys and
        values repeated for each head, attention's output twice (once with flash, which repeats nothing), the four
        products of the MLP; with qwen3 query and key once more before their norms.
        """
        norms = (4 + 2 * item) * self.hidden * 2
        attention = item * ((2 * self.query + 2 * self.key) if flash else 5 * self.query)
        inner = (4 + item) * (self.query + self.key) if self.kind == "qwen3" else 0
        return norms + attention + inner + 4 * item * self.mlp

    def cache(self, item: int) -> int:
        """Bytes of keys and values a token, over all layers."""
        return 2 * self.layers * self.key * item


KNOWN = {
    "Qwen/Qwen3-4B-Thinking-2507": Shape(
        "Qwen3-4B-Thinking-2507", "qwen3", 151936, 2560, 36, 32, 8, 128, 9728, True, 262144,
        "config.json of Qwen/Qwen3-4B-Thinking-2507 on the Hub",
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": Shape(
        "DeepSeek-R1-Distill-Qwen-14B", "qwen2", 152064, 5120, 48, 40, 8, 128, 13824, False, 131072,
        "config.json of deepseek-ai/DeepSeek-R1-Distill-Qwen-14B on the Hub",
    ),
}  # fmt: skip
"""Models of the named recipes, so that a plan needs no download."""
KINDS = ("llama", "mistral", "qwen2", "qwen3")


def shape_of(recipe: Recipe, config: Path | None = None) -> Shape:
    """The policy's shape: from `config` (a model's folder or config.json), the recipe's own folder, or `KNOWN`.

    Raises RequestError where there is none to be had, or where it is of a kind that the arithmetic does not cover.
    """
    model = recipe.policy.model
    if config is None and recipe.policy.cold_start is not None:
        return _of_cold_start(recipe.policy.cold_start)
    if config is None and model in KNOWN:
        return KNOWN[model]
    place = config if config is not None else Path(model or "")
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise RequestError(
            f"no config.json in {place}: a plan needs the model's shape; give --model-config a folder or file of it"
        )
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: can't be read ({' '.join(str(error).split())})") from None
    return _of_config(tree, file, model or file.parent.name)


def _of_cold_start(made: ColdStart) -> Shape:
    return Shape(
        "cold start", "qwen3", made.vocabulary, made.hidden, made.layers, made.heads, made.kv_heads, made.head_dim,
        made.mlp, True, 1024, "policy.cold_start of the recipe",
    )  # fmt: skip


def _of_config(tree: Any, file: Path, name: str) -> Shape:
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind not in KINDS:
        raise RequestError(f"{file}: model_type {kind!r}; a plan knows {', '.join(KINDS)}, dense models of one shape")
    try:
        heads = int(tree["num_attention_heads"])
        return Shape(
            name,
            kind,
            int(tree["vocab_size"]),
            int(tree["hidden_size"]),
            int(tree["num_hidden_layers"]),
            heads,
            int(tree.get("num_key_value_heads") or heads),
            int(tree.get("head_dim") or int(tree["hidden_size"]) // heads),
            int(tree["intermediate_size"]),
            bool(tree.get("tie_word_embeddings", False)),
            _longest(tree),
            str(file),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{file}: no usable {error}; give the model's own config.json") from None


def _longest(tree: dict[str, Any]) -> int | None:
    """Positions of a config.json, as vLLM derives them: stretched by a scaled rotation, where they are not yet."""
    known = tree.get("max_position_embeddings")
    scaling = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if known is None or kind in ("default", "su", "longrope", "llama3", "mrope"):
        return known
    if kind == "yarn":
        known = scaling.get("original_max_position_embeddings", known)
    return int(known * float(scaling.get("factor", 1.0)))


def show_bytes(number: float) -> str:
    """Three digits and a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.3g} TiB"
