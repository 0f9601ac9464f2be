"""Random policies in a real one's shape, completions to learn from, and a pass through the learner's own parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.device import device
from pipeline.errors import RequestError
from pipeline.policies.shapes import KNOWN, Shape
from pipeline.recipe import Learning, Recipe, load_recipe
from trainer import engine as engines
from trainer import launching
from trainer.attention import chosen, register
from trainer.dealing import Amount, amount
from trainer.losses import LOSSES, Batch, Settings
from trainer.passes import Pass, collate
from trainer.view import Example, Sizes
from trainer.work import refuse_missing_packages

RECIPE = "qwen3-4b-math"
"""Whose settings are measured."""
FULL = KNOWN["Qwen/Qwen3-4B-Thinking-2507"]
TINY = Shape("tiny", "qwen3", 256, 32, 2, 4, 2, 16, 64, True)


@dataclass(frozen=True, slots=True)
class Scale:
    """What is measured at: the real sizes, or small ones with which the same code takes seconds on a CPU."""

    small: bool

    @property
    def shape(self) -> Shape:
        return TINY if self.small else FULL

    @property
    def probe(self) -> Shape:
        """A small policy on which rounding is looked at; its heads are as large as the real ones."""
        if self.small:
            return TINY
        return Shape("probe", "qwen3", 4096, 512, 2, 8, 2, 128, 1024, True)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Tokens of a pass: a short one, the recipe's, and twice that."""
        return (16, 32, 64) if self.small else (4096, 18432, 36864)

    @property
    def repeat(self) -> int:
        return 1 if self.small else 3


def recipe(tokens: int, **learning: Any) -> Recipe:
    """The recipe on one card, with passes of so many tokens."""
    made = load_recipe(RECIPE)
    changed = {"ranks": 1, "micro_batch_tokens": tokens, **learning}
    return made.model_copy(
        update={
            "learning": made.learning.model_copy(update=changed),
            "generation": made.generation.model_copy(update={"max_model_len": tokens}),
        }
    )


def refusal(kernel: str, dtype: str) -> str | None:
    """Why the learner would not take this kernel here; null where it would."""
    try:
        refuse_missing_packages(Learning().model_copy(update={"attention": kernel, "dtype": dtype}))
    except RequestError as error:
        return str(error)
    return None


def usual_kernel(dtype: str = "bfloat16") -> str:
    """What the learner takes here where nothing is said."""
    return chosen(Learning().model_copy(update={"dtype": dtype}))


def make(shape: Shape, dtype: torch.dtype, attention: str, spread: float = 0.02) -> Any:
    """A Qwen3 with random weights on the device; seed torch before the call."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        max_position_embeddings=shape.longest or 1 << 16,
        initializer_range=spread,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.train()


def scored(shape: Shape, learning: Learning, attention: str) -> engines.Scored:
    """The policy as the learner wraps it, without an optimizer."""
    torch.manual_seed(0)
    model = make(shape, torch.bfloat16, register(attention))
    if learning.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return engines.Scored(model, 1.0)


@contextmanager
def engine_of(shape: Shape, settings: Recipe) -> Iterator[Any]:
    """The learner's own engine on a random policy in that shape, from a folder as a round has it."""
    be_the_only_rank()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        make(shape, torch.bfloat16, "sdpa").save_pretrained(folder)
        engine = engines.start(settings, Path(folder), 1.0, engines.ALONE)
    try:
        yield engine
    finally:
        engine.destroy()


def be_the_only_rank() -> None:
    """What `python -m trainer` does before it learns on one card."""
    import deepspeed
    import torch.distributed as dist

    if not dist.is_initialized():
        launching.become_a_rank()
        deepspeed.init_distributed(launching.backend(), verbose=False)


MIXES = ("one sequence", "group of 8")


def examples_of(mix: str, tokens: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """Completions that, packed, are `tokens` positions: one, or eight that share a prompt of a sixteenth of them."""
    rng = np.random.default_rng(seed)
    prompt = max(2, tokens // 16)
    count = 1 if mix == MIXES[0] else 8
    rest, over = divmod(tokens - prompt, count)
    lengths = [rest + 1 + (number < over) for number in range(count)]  # the last token of each is not computed
    shared = rng.integers(3, vocabulary, prompt).astype(np.int32)
    return [example(shared, length, vocabulary, rng) for length in lengths]


def example(prompt: np.ndarray[Any, Any], length: int, vocabulary: int, rng: np.random.Generator) -> Example:
    behaviour = (rng.normal(0, 0.1, length) - np.log(vocabulary)).astype(np.float32)
    tokens = rng.integers(3, vocabulary, length).astype(np.int32)
    reward = float(rng.integers(2))
    return Example(prompt, tokens, behaviour, behaviour, reward - 0.5, reward)


def amount_of(examples: Sequence[Example]) -> Amount:
    """What a packed pass over neighbours of one group is, counted as the learner counts it."""
    prompt, completion = ([len(tokens) for tokens in part] for part in zip(*map(_tokens, examples), strict=True))
    sizes = Sizes(np.array(prompt), np.array(completion), np.zeros(len(examples), np.int64), packed=True)
    return amount([range(len(examples))], sizes)


def _tokens(one: Example) -> tuple[Any, Any]:
    return one.prompt_tokens, one.completion_tokens


def laid_out(examples: Sequence[Example], attention: str | None) -> Pass:
    """Neighbours of one group as a pass on the device."""
    return collate(examples, [0] * len(examples), 0, attention).to(device())


def learn(module: Any, taken: Pass, learning: Learning, backward: Callable[[torch.Tensor], Any], over: int) -> None:
    """A pass forward and backward as the learner makes it, its loss a mean over so many sequences."""
    logprobs = engines.score(module, taken)
    batch = Batch(logprobs, taken.behaviour, taken.mask, taken.advantage, taken.reward, taken.sampled)
    told = Settings(**{name: getattr(learning, name) for name in Settings.__slots__})
    losses, _ = LOSSES[learning.loss](batch, told)
    backward(losses.sum() / over)
