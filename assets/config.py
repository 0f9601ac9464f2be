"""What the launchpad offers: the settings that one changes between rounds, with the run's own as defaults.

Each class belongs to one asset. Bounds are those of the recipe; they are checked for all steps of a run before
its first one does anything.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from assets.rounds import RECIPE


def _overrides(part: str, values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield f"{part}.{name}={json.dumps(value)}"


class RolloutsConfig(dg.Config):
    prompts: int = Field(default=RECIPE.prompts.per_round, gt=0, description="Training prompts of the round.")
    samples: int = Field(default=RECIPE.generation.samples, ge=2, description="Completions a prompt (the group).")
    temperature: float = Field(default=RECIPE.generation.temperature, gt=0, le=10, description="Sampling temperature.")
    top_p: float = Field(default=RECIPE.generation.top_p, gt=0, le=1, description="Nucleus kept when sampling.")
    max_tokens: int = Field(default=RECIPE.generation.max_tokens, gt=0, description="Longest completion, in tokens.")

    def overrides(self) -> list[str]:
        generation = self.model_dump(exclude={"prompts"})
        return [*_overrides("generation", generation), f"prompts.per_round={self.prompts}"]


class VerdictsConfig(dg.Config):
    math_timeout_s: float = Field(
        default=RECIPE.verification.math_timeout_s, gt=0, description="Seconds that judging one answer may take."
    )
    code_timeout_s: float = Field(
        default=RECIPE.verification.code_timeout_s, gt=0, description="Wall-clock seconds of one test of a program."
    )
    run_all_tests: bool = Field(
        default=RECIPE.verification.run_all_tests, description="Go on after a program's first failing test."
    )

    def overrides(self) -> list[str]:
        return [*_overrides("verification", self.model_dump())]


class LearningConfig(dg.Config):
    beta1: float = Field(
        default=RECIPE.learning.beta1,
        gt=0,
        description="Temperature of the value V(x): towards 0 the group's best reward, towards infinity its mean.",
    )
    beta2: float = Field(
        default=RECIPE.learning.beta2,
        gt=0,
        description="Scale of the log-ratio; the regression target is (r - V) / beta2 nats a sequence.",
    )
    learning_rate: float = Field(default=RECIPE.learning.learning_rate, gt=0, lt=1, description="Of AdamW.")
    epochs: int = Field(default=RECIPE.learning.epochs, gt=0, description="Passes over the round's rollouts.")
    batch_size: int = Field(default=RECIPE.learning.batch_size, gt=0, description="Sequences an optimizer step.")
    drop_uniform_groups: bool = Field(
        default=RECIPE.learning.drop_uniform_groups,
        description="Leave out groups whose rewards are all equal; they stay in the dataset.",
    )
    max_logprob_gap: float = Field(
        default=RECIPE.learning.max_logprob_gap,
        gt=0,
        description="Largest admitted mean difference of the learner's and engine's log-probabilities, nats a token.",
    )
    max_residual_gap: float | None = Field(
        default=RECIPE.learning.max_residual_gap,
        gt=0,
        description="oapl: largest admitted mean of their sum over a completion, times beta2, in units of reward.",
    )

    def overrides(self) -> list[str]:
        return [*_overrides("learning", self.model_dump())]


class EvaluationConfig(dg.Config):
    samples: int = Field(default=RECIPE.evaluation.samples, gt=0, description="Completions of each held-out prompt.")
    ks: list[int] = Field(default=list(RECIPE.evaluation.ks), description="Values of k; none above `samples`.")
    temperature: float = Field(default=RECIPE.evaluation.temperature, gt=0, le=10, description="Sampling temperature.")

    def overrides(self) -> list[str]:
        return [*_overrides("evaluation", self.model_dump())]


StepConfig = RolloutsConfig | VerdictsConfig | LearningConfig | EvaluationConfig
CONFIGS: dict[str, type[StepConfig]] = {
    "rollouts": RolloutsConfig,
    "verdicts": VerdictsConfig,
    "trained_policy": LearningConfig,
    "pass_at_k": EvaluationConfig,
}
