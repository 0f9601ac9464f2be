"""The real engine: vLLM, one code path for CPU and GPU. The only module that imports it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import RequestError, WorkError
from pipeline.generation.engine import Completion, Request
from pipeline.recipe import Generation

_ROOM = 64
"""Tokens of head room in a scheduler step beyond the longest prompt."""
_MOST = 400
"""Letters of vLLM's own words in an error's line."""


class VllmEngine:
    """`LLMEngine` in this process, stepped by hand, so that each completion is handed over when it ends.

    Log-probabilities are the processed ones: of the distribution that was sampled from. Raises RequestError where vLLM
    refuses the settings with this policy, WorkError where it does not start.
    """

    name = "vllm"
    logprobs_mode = "processed_logprobs"

    def __init__(self, policy: Path, settings: Generation, seed: int) -> None:
        # The engine core stays in this process: it is a process of its own already, and killing it must kill all.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if settings.tensor_parallel == 1 else "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(settings.kv_cache_gib))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            # vLLM compiles a few helpers through TorchInductor, which needs a C++ compiler on a CPU and dies without.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        try:
            import vllm
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise WorkError(
                f"generation needs vLLM, which does not import here ({error}); install oapl[cpu] or oapl[gpu]"
            ) from None
        self.version: str = vllm.__version__
        self.sampling = settings
        """How requests submitted from now on are sampled; may be replaced, within the engine's longest sequence."""
        try:
            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(policy),
                    dtype=settings.dtype,
                    seed=seed,
                    max_model_len=settings.max_model_len,
                    max_num_seqs=settings.max_num_seqs,
                    # A prompt is never split over steps: rewinding a seeded generator after a partial prefill
                    # is not implemented on a CPU, and fails there.
                    enable_chunked_prefill=False,
                    max_num_batched_tokens=max(8192, settings.max_model_len + _ROOM),
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    tensor_parallel_size=settings.tensor_parallel,
                    enforce_eager=settings.enforce_eager,
                    logprobs_mode=self.logprobs_mode,
                    generation_config="vllm",  # sampling is the recipe's alone, never the model folder's
                    disable_log_stats=True,
                )
            )
        except ValueError as error:
            raise RequestError(f"vLLM refuses {policy} with these settings: {_words(error)}{_cure(error)}") from error
        except (AssertionError, OSError, RuntimeError) as error:
            raise WorkError(f"vLLM did not start with {policy}: {_words(error)}{_cure(error)}") from error

    def submit(self, request: Request) -> None:
        from vllm import SamplingParams

        settings = self.sampling
        self._engine.add_request(
            request.key,
            {"prompt_token_ids": request.prompt_tokens},
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_tokens=min(settings.max_tokens, settings.max_model_len - len(request.prompt_tokens)),
                seed=request.seed,
                logprobs=0,  # the sampled token's alone
                flat_logprobs=True,
                detokenize=False,
            ),
        )

    def step(self) -> list[Completion]:
        return [_completion(output) for output in self._engine.step() if output.finished]

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _words(error: Exception) -> str:
    """The first sentences of what vLLM says, without pydantic's frame around them."""
    told = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
    words = " ".join(told.split())
    return words if len(words) <= _MOST else words[:_MOST].rpartition(". ")[0] or words[:_MOST]


_CURES = (
    (
        r"KV cache|cache blocks",
        "raise generation.gpu_memory_utilization or tensor_parallel (on a CPU generation.kv_cache_gib), or lower "
        "generation.max_model_len",
    ),
    (r"[Ff]ree memory on device", "lower generation.gpu_memory_utilization, or see who else works on the card"),
    (r"out of memory|can't allocate", "lower generation.gpu_memory_utilization or max_num_seqs"),
    (r"max_model_len|max_position_embeddings", "lower generation.max_model_len or evaluation.max_tokens"),
    (r"divisible by|tensor.parallel", "set a generation.tensor_parallel that divides the policy's heads"),
)
"""What vLLM complains of, and the recipe's settings that mend it."""


def _cure(error: Exception) -> str:
    text = str(error)
    return next((f"; {mend}" for pattern, mend in _CURES if re.search(pattern, text)), "")


def _completion(output: Any) -> Completion:
    made = output.outputs[0]
    tokens = list(made.token_ids)
    flat = made.logprobs
    # With logprobs=0 there is one entry a position, the sampled token's.
    assert list(flat.token_ids) == tokens, "log-probabilities are not those of the sampled tokens"
    return Completion(output.request_id, tokens, list(flat.logprobs), made.finish_reason or "abort")
