"""A recipe: everything that decides what a round does, as one frozen, typed tree.

Recipes are YAML; the named ones lie in `pipeline/recipes/`. A value can be replaced on the
command line with `--set key.path=value`. Whatever is wrong is said in one line before anything starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import RequestError

RECIPES = Path(__file__).parent / "recipes"

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
DType = Literal["float32", "bfloat16"]
Where = Literal["local", "ray"]
"""In this process and its children, or on a Ray cluster: that of RAY_ADDRESS, else one for the length of the stage."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class ColdStart(_Part):
    """Supervised start of the embedded policy: a small Qwen3 made from nothing, mediocre on purpose."""

    steps: Positive = 450
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-3
    wrong_sums: Annotated[float, Field(ge=0, lt=1)] = 0.35
    """Share of arithmetic traces that forget the last term: what keeps pass@1 low and pass@16 high."""
    wrong_programs: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The same of programs, which are learned more easily."""
    vocabulary: Annotated[int, Field(ge=300)] = 384
    hidden: Positive = 128
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    head_dim: Positive = 32
    mlp: Positive = 384


class Policy(_Part):
    """Where the first snapshot comes from: exactly one of the two."""

    model: str | None = None
    """A folder in Hugging Face format, or a Hub id."""
    cold_start: ColdStart | None = None

    @model_validator(mode="after")
    def _one(self) -> Policy:
        if (self.model is None) == (self.cold_start is None):
            raise ValueError("give exactly one of policy.model and policy.cold_start")
        return self


class Prompts(_Part):
    train: str = "tiny"
    """`tiny` (generated), or a JSONL or Parquet file."""
    heldout: str | None = "tiny"
    """As `train`; null: a share of the training file is held out, by prompt."""
    per_round: Positive = 256
    """Training prompts of a round; each round takes the next ones, shuffled by the seed."""
    heldout_count: Positive = 128
    max_tokens: Positive | None = None
    """Training prompts of more tokens, chat template included, are left out; null: none. Held-out ones never are. Needs
    `policy.model`, whose tokenizer counts."""


class Generation(_Part):
    engine: Where = "local"
    """`local`: one vLLM on this machine; `ray`: replicas of it on a Ray cluster, all writing into one dataset."""
    replicas: Annotated[int, Field(ge=0)] = 0
    """ray: engines, each on `tensor_parallel` GPUs of one node; 0: as many as the cluster has room for."""
    replica_cpus: Positive = 1
    """ray: CPUs that a replica reserves."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt (G, the group)."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 keeps the whole vocabulary."""
    max_tokens: Positive = 64
    max_model_len: Positive = 256
    dtype: DType = "bfloat16"
    max_num_seqs: Positive = 256
    """Sequences the engine decodes at once."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Key-value cache on a CPU, in GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    tensor_parallel: Positive = 1
    enforce_eager: bool = False
    shard_rows: Positive = 4096
    """Rows of a shard; a shard is what a crash can lose."""


class Verification(_Part):
    engine: Where = "local"
    """`ray`: one task a shard of rollouts on a Ray cluster."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes, on Ray those of one task; 0: one a core, on Ray one a task."""
    math_timeout_s: Seconds = 5.0
    code_timeout_s: Seconds = 4.0
    """Wall-clock seconds of one test."""
    code_memory_mib: Annotated[int, Field(ge=64)] = 512
    code_output_kib: Positive = 1024
    run_all_tests: bool = False
    """False stops at the first failing test."""
    isolation: Literal["bubblewrap", "process"] = "bubblewrap"
    """`process` admits plain child processes with limits where namespaces can't be had; recorded on each verdict."""


class Learning(_Part):
    """How a round is learned. The defaults are for a pretrained model of billions of weights on cards; a policy of a
    few million, which learns nothing at such a rate, names its own (see recipe `tiny`)."""

    loss: Literal["oapl", "grpo", "sft"] = "oapl"
    """`grpo` and `sft` (imitation of right completions) are there to compare with, on the same batches."""
    beta1: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the value estimate V(x): towards 0 the group's best reward, towards infinity its mean."""
    beta2: Annotated[float, Field(gt=0)] = 1e-3
    """Scale of the log-ratio in the loss; the regression target is (r - V) / beta2 nats."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.8
    clip_high: Annotated[float, Field(ge=1)] = 1.28
    """grpo: bounds of a token's importance ratio."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """grpo with `behaviour: recomputed`: largest weight of a token for what engine and trainer disagree by."""
    optimizer: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW: torch's fused one, or DeepSpeed's, which needs a compiler (nvcc, with `offload` a C++ one)."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Where linear and cosine end, as a share of `learning_rate`."""
    horizon_rounds: Annotated[int, Field(ge=0)] = 1
    """Rounds over which the schedule runs; 0: it starts anew with each round."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    epochs: Positive = 1
    batch_size: Positive = 256
    """Sequences an optimizer step, over all ranks."""
    micro_batch_tokens: Positive = 16_384
    """Tokens, padding included, of a forward pass on one rank; the longest sequence may exceed it alone."""
    keep_optimizer: bool = True
    """Carry Adam's moments from round to round; float32 masters of bfloat16 weights, and adapters, always are."""
    drop_uniform_groups: bool = True
    """Leave out groups whose rewards are all equal; they stay in the dataset."""
    verifier_version: str | None = None
    """Verdicts of this version of a verifier count instead of its newest ones."""
    replay_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds before this one whose rollouts are learned from again, each row with its own log-probabilities."""
    behaviour: Literal["engine", "recomputed"] = "engine"
    """Whose log-probabilities stand for the behaviour policy: what the engine said when it sampled, or one forward
    pass of the trainer over the frozen snapshot, kept beside the rollouts."""
    max_logprob_gap: Annotated[float, Field(gt=0)] = 0.05
    """Largest admitted |mean(trainer - engine)| in nats a token, measured before learning."""
    max_residual_gap: Annotated[float, Field(gt=0)] | None = 0.05
    """oapl: largest admitted |mean over completions of sum(trainer - engine)| x beta2, in units of reward: so much the
    gap adds to each residual. 0.05 is less than any advantage of eight completions with rewards 0 and 1 and beta1 1
    (the least is 0.08), so that no sign turns. null: no bound."""
    ranks: Positive = 1
    """Processes that learn together, one a card, over all nodes."""
    launcher: Literal["local", "torchrun-hosts", "slurm"] = "local"
    """Who starts the ranks: one launcher on this machine; one on each of `hosts`, through ssh; or one on each node of
    the Slurm allocation that this runs in, through srun. All nodes see the same folders."""
    hosts: tuple[str, ...] = ()
    """torchrun-hosts: the nodes, as ssh knows them; each has ranks / hosts of the ranks, the first one rank 0."""
    sequence_parallel: Positive = 1
    """Ranks that share each forward pass, for long sequences: each keeps that share of its activations. Divides `ranks`
    and the policy's attention heads."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the host's memory: the optimizer (from zero_stage 1), or weights, too (zero_stage 3)."""
    dtype: DType = "bfloat16"
    """bfloat16 computes in bfloat16 and keeps float32 master weights in the optimizer (so it runs
    as zero_stage 1 at the least)."""
    attention: Literal["auto", "sdpa", "eager", "varlen", "flash", "flex"] = "auto"
    """Kernel of attention. auto: varlen, PyTorch's own FlashAttention, on a card in bfloat16, else sdpa. flash (needs
    the package flash-attn or kernels) and flex are for GPUs, too; eager is there to check the others by."""
    packing: bool = True
    """Completions one after another without padding, a group's prompt computed once. False pads, for a policy whose
    attention can't be packed."""
    activation_checkpointing: bool = True
    """Compute activations twice instead of keeping them."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of adapters on all linear layers, trained instead of the weights and merged into the snapshot; 0: none. The
    next round goes on with the adapters themselves."""
    lora_alpha: Positive = 32
    """Scale of the adapters; their update counts lora_alpha / lora_rank."""
    tensorboard: bool = False
    """Write the learning log for TensorBoard, too, beside it."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between checkpoints; 0: none within a round."""

    @model_validator(mode="after")
    def _splits(self) -> Learning:
        teams, left_over = divmod(self.ranks, self.sequence_parallel)
        if left_over:
            raise ValueError(f"ranks {self.ranks} must be a multiple of sequence_parallel {self.sequence_parallel}")
        if self.sequence_parallel > 1 and not self.packing:
            raise ValueError("sequence_parallel splits packed batches; leave packing on")
        if self.batch_size % teams:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of {teams} (ranks / sequence_parallel)")
        return self

    @property
    def nodes(self) -> int:
        """Machines that the ranks are spread over; under Slurm it is the allocation that says how many."""
        if self.launcher == "slurm":
            return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        return max(1, len(self.hosts))

    @property
    def ranks_a_node(self) -> int:
        return -(-self.ranks // self.nodes)

    @model_validator(mode="after")
    def _nodes(self) -> Learning:
        if (self.launcher == "torchrun-hosts") != bool(self.hosts):
            raise ValueError(f"hosts belong to launcher=torchrun-hosts, and it to them; launcher is {self.launcher}")
        if self.hosts and self.ranks % len(self.hosts):
            raise ValueError(f"ranks {self.ranks} must be a multiple of the {len(self.hosts)} hosts")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Learning:
        if self.importance_cap is not None and (self.loss, self.behaviour) != ("grpo", "recomputed"):
            raise ValueError("importance_cap needs loss=grpo and behaviour=recomputed")
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload={self.offload} needs zero_stage {needed} or more, not {self.zero_stage}")
        if self.attention in ("varlen", "flash", "flex") and not self.packing:
            raise ValueError(f"attention={self.attention} is for packed batches; leave packing on, or take auto")
        return self


class Evaluation(_Part):
    samples: Positive = 16
    ks: tuple[Positive, ...] = (1, 8, 16)
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive | None = None
    """Longest completion; null: that of `generation`. `generation.max_model_len` grows with it."""

    @model_validator(mode="after")
    def _enough(self) -> Evaluation:
        if max(self.ks) > self.samples:
            raise ValueError(f"pass@{max(self.ks)} needs at least {max(self.ks)} samples, not {self.samples}")
        return self


class Nightly(_Part):
    """When the schedule `nightly_retraining`, once it is turned on, opens the next round."""

    cron: str = "0 2 * * *"
    """Minute, hour, day of the month, month, day of the week; the last two also by name (jan, mon-fri)."""
    time_zone: str = "UTC"
    """A name of the IANA database, such as Europe/Berlin."""

    @model_validator(mode="after")
    def _exists(self) -> Nightly:
        fields = self.cron.split()
        if len(fields) != len(_CRON) or not all(
            _fits_cron(field, *bounds) for field, bounds in zip(fields, _CRON, strict=True)
        ):
            raise ValueError(f"cron: expected five fields such as '0 2 * * *' or '30 3 * * mon-fri', not {self.cron!r}")
        try:
            ZoneInfo(self.time_zone)
        except (ValueError, OSError, ZoneInfoNotFoundError):
            raise ValueError(f"time_zone: no zone named {self.time_zone!r}; give one such as Europe/Berlin") from None
        return self


_CRON: tuple[tuple[int, int, str], ...] = (
    (0, 59, ""),
    (0, 23, ""),
    (1, 31, ""),
    (1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    (0, 7, "sun mon tue wed thu fri sat"),
)
"""The least, the greatest, and the names of a cron line's fields, counted from the least."""


def _fits_cron(field: str, low: int, high: int, names: str) -> bool:
    numbers = {name: low + place for place, name in enumerate(names.split())}
    for part in field.lower().split(","):
        found = re.fullmatch(r"(?:\*|(\d+|[a-z]+)(?:-(\d+|[a-z]+))?)(?:/([1-9]\d*))?", part)
        if found is None:
            return False
        for end in filter(None, found.groups()[:2]):
            if not (low <= int(end) <= high if end.isdigit() else end in numbers):
                return False
    return True


class Recipe(_Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Also the name of the run's folder."""
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    rounds: Positive = 1
    nightly: Nightly = Nightly()
    lag_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds that the generating policy lags behind: with 1, round k is generated by what round k-2 published, so that
    an engine generates it while the learner, on other devices, still learns round k-1."""
    policy: Policy
    prompts: Prompts = Prompts()
    generation: Generation = Generation()
    verification: Verification = Verification()
    learning: Learning = Learning()
    evaluation: Evaluation = Evaluation()

    def for_evaluation(self) -> Generation:
        """How held-out prompts are sampled: the engine's settings with what `evaluation` says instead."""
        told, usual = self.evaluation, self.generation
        longest = told.max_tokens or usual.max_tokens
        return usual.model_copy(
            update={
                "samples": told.samples,
                "temperature": told.temperature,
                "top_p": told.top_p,
                "top_k": 0,
                "max_tokens": longest,
                "max_model_len": usual.max_model_len + max(0, longest - usual.max_tokens),
            }
        )

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: two recipes with one digest do the same."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes every value, defaults included, so that the file means the same in later versions."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def named_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or file, with `key.path=value` overrides applied.

    Raises RequestError in one line: which recipe, which key, what was expected.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_file}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(named_recipes())
        raise RequestError(f"no recipe {name_or_file!r}; give a .yaml file or one of: {known}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"recipe {path}: can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RequestError(f"recipe {path}: expected a mapping of settings at the top")
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RequestError(f"recipe {name_or_file}: {_first_problem(error)}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *folders, leaf = key.strip().split(".")
    if not equals or not leaf:
        raise RequestError(f"--set {override!r}: expected key.path=value, such as learning.beta2=0.1")
    for folder in folders:
        if tree.get(folder) is None:
            tree[folder] = {}
        if not isinstance(tree[folder], dict):
            raise RequestError(f"--set {override!r}: {folder} is a single value and has no settings below it")
        tree = tree[folder]
    try:
        found = yaml.safe_load(value)
        tree[leaf] = found if value.lstrip()[:1] in ("'", '"') else _number_or_text(found)
    except yaml.YAMLError:
        raise RequestError(f"--set {override!r}: the value is not YAML; quote it") from None


def _number_or_text(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "settings"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r}"
    if first["type"] == "extra_forbidden":
        message, given = "no such setting", ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {message[0].lower()}{message[1:]}{given}{more}"


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for each setting that differs, in the recipe's order."""
    return _differ(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def _differ(old: Any, new: Any, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line for key in keys for line in _differ(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
