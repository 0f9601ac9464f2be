"""The learner's step beside TRL's way and the official OAPL's way, and log-probabilities beside full logits.

    python benchmarks/learner/bench_learner.py step --policy tiny|FOLDER [--run RUN] [--sequences 16] [--median 48]
    python benchmarks/learner/bench_learner.py logprobs [--tokens 8192] [--vocabulary 49152] [--width 576]
    python benchmarks/learner/bench_learner.py precision --policy FOLDER --run RUN
    python benchmarks/learner/bench_learner.py profile --policy FOLDER --run RUN

`step`: forward and backward pass of one batch under the same OAPL loss, the three ways in turn, so that what else the
machine does falls on all of them; on one thread (the default) processor seconds are compared. The ways differ in how
a batch is laid out and in how logits become log-probabilities, nothing else:

- ours: packed, a group's prompt once, logits in chunks;
- TRL: eight sequences a pass (its default), prompts padded on the left and completions on the right to the longest,
  log-probabilities by its own `selective_log_softmax` (trl 1.16, imported) of the completion's logits only;
- official: as TRL pads, all logits of all positions, `log_softmax` and `gather` (danieldritter/OAPL).

`logprobs`: each way in a process of its own, peak memory above what the process had before; times in turn.

`precision`: the packed step in float32 and in bfloat16 against float64, one sequence after another with all logits.

`profile`: where the processor seconds of a packed step go, by kind of operation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.arithmetic import of_model
from trainer.attention import register
from trainer.dealing import amount, deal
from trainer.engine import Scored
from trainer.logprobs import token_logprobs
from trainer.passes import collate
from trainer.peaks import matmul_flops
from trainer.policy import load_policy
from trainer.view import Example, Sizes

TEMPERATURE, BETA2 = 1.0, 0.05
BUDGET = 4096
"""Positions a pass: that of recipe `tiny`."""
SEQUENCES_A_PASS = 8
"""TRL's default per_device_train_batch_size."""


def clock() -> float:
    """Processor seconds on one thread, where what others do on the machine does not count; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def lengths_of(kind: str, sequences: int, median: int, rng: np.random.Generator) -> list[int]:
    """Completion lengths: all alike; log-normal as a round's are; a tenth of them ten times the median."""
    if kind == "equal":
        return [median] * sequences
    if kind == "round":
        return np.clip(rng.lognormal(np.log(median), 0.6, sequences), 2, 8 * median).astype(int).tolist()
    tail = max(1, sequences // 10)
    lengths = rng.integers(median // 2, median * 3 // 2, sequences)
    lengths[rng.choice(sequences, tail, replace=False)] = 10 * median
    return lengths.tolist()


def batch_of(kind: str, sequences: int, median: int, group: int, vocabulary: int) -> tuple[list[Example], list[int]]:
    rng = np.random.default_rng(0)
    lengths = lengths_of(kind, sequences, median, rng)
    examples = []
    for number, length in enumerate(lengths):
        if number % group == 0:
            prompt = rng.integers(3, vocabulary, rng.integers(median * 2 // 3, median * 4 // 3)).astype(np.int32)
        mu = rng.normal(-3, 1, length).astype(np.float32)
        tokens = rng.integers(3, vocabulary, length).astype(np.int32)
        examples.append(Example(prompt, tokens, mu, mu, rng.uniform(-1, 1), 1.0))
    return examples, [number // group for number in range(sequences)]


def batch_of_run(folder: Path, sequences: int) -> tuple[list[Example], list[int]]:
    """The first completions of a run's first round, as its policy wrote them; advantages are drawn."""
    from itertools import islice

    from pipeline.layout import Run
    from pipeline.rollouts.store import iter_batches

    columns = ["prompt_id", "prompt_tokens", "completion_tokens", "logprobs"]
    batches = iter_batches(Run(folder.parent.parent, folder.name).rollouts(0), columns)
    rows = list(islice((row for batch in batches for row in batch.to_pylist()), sequences))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(row["prompt_id"] for row in rows))}
    rng = np.random.default_rng(0)
    examples = []
    for row in rows:
        prompt, completion = (np.array(row[name], np.int32) for name in columns[1:3])
        mu = np.array(row["logprobs"], np.float32)
        examples.append(Example(prompt, completion, mu, mu, rng.uniform(-1, 1), 1.0))
    return examples, [numbers[row["prompt_id"]] for row in rows]


def squared(logprobs: torch.Tensor, behaviour: torch.Tensor, mask: torch.Tensor, advantage: torch.Tensor) -> Any:
    ratio = (logprobs - behaviour).masked_fill(~mask, 0.0).sum(-1)
    return (BETA2 * ratio - advantage).square().sum()


def sizes_of(examples: Sequence[Example], groups: Sequence[int]) -> Sizes:
    return Sizes(
        np.array([len(e.prompt_tokens) for e in examples], np.int64),
        np.array([len(e.completion_tokens) for e in examples], np.int64),
        np.array(groups),
        True,
    )


def ours(model: Any, examples: Sequence[Example], groups: Sequence[int]) -> float:
    scored, total = Scored(model, TEMPERATURE), 0.0
    for rows in deal(range(len(examples)), sizes_of(examples, groups), BUDGET, 1, of_model(model))[0]:
        taken = collate([examples[row] for row in rows], [groups[row] for row in rows], 0, "sdpa")
        chosen = scored(taken.ids, taken.positions, taken.layout, taken.sources, taken.targets)
        logprobs = torch.zeros(taken.mask.shape).masked_scatter(taken.mask, chosen)
        loss = squared(logprobs, taken.behaviour, taken.mask, taken.advantage)
        loss.backward()
        total += loss.item()
    return total


def padded(model: Any, examples: Sequence[Example], full: bool) -> float:
    """TRL's batch: prompts on the left, completions on the right. `full`: the official way with all logits."""
    from trl.trainer.utils import selective_log_softmax

    order = np.random.default_rng(1).permutation(len(examples))
    total = 0.0
    for start in range(0, len(order), SEQUENCES_A_PASS):
        part = [examples[row] for row in order[start : start + SEQUENCES_A_PASS]]
        before, after = (max(len(getattr(e, key)) for e in part) for key in ("prompt_tokens", "completion_tokens"))
        ids = torch.zeros(len(part), before + after, dtype=torch.long)
        present = torch.zeros_like(ids)
        behaviour, mask = torch.zeros(len(part), after), torch.zeros(len(part), after, dtype=torch.bool)
        for line, e in enumerate(part):
            prompt, end = before - len(e.prompt_tokens), before + len(e.completion_tokens)
            ids[line, prompt:end] = torch.from_numpy(np.concatenate([e.prompt_tokens, e.completion_tokens]).astype(int))
            present[line, prompt:end] = 1
            behaviour[line, : len(e.behaviour)] = torch.from_numpy(e.behaviour)
            mask[line, : len(e.behaviour)] = True
        keep = {} if full else {"logits_to_keep": after + 1}
        positions = (present.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=present, position_ids=positions, use_cache=False, **keep).logits
        logits, targets = logits[:, :-1], ids[:, -after:]
        if full:
            everything = torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)
            logprobs = everything.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -after:]
        else:
            logprobs = selective_log_softmax(logits[:, -after:] / TEMPERATURE, targets)
        loss = squared(logprobs, behaviour, mask, torch.tensor([e.advantage for e in part]))
        loss.backward()
        total += loss.item()
    return total


def policy_of(name: str, attention: str) -> Any:
    if name != "tiny":
        return load_policy(Path(name), torch.float32, attention).train()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=448, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=384, tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train()


def step(arguments: argparse.Namespace) -> None:
    packed = policy_of(arguments.policy, register("sdpa"))
    plain = policy_of(arguments.policy, "sdpa")
    peak = matmul_flops(torch.device("cpu"), torch.float32, clock=clock)
    vocabulary = min(packed.config.vocab_size, 40_000)
    for kind in [str(arguments.run)] if arguments.run else arguments.lengths:
        if arguments.run:
            examples, groups = batch_of_run(arguments.run, arguments.sequences)
        else:
            examples, groups = batch_of(kind, arguments.sequences, arguments.median, arguments.group, vocabulary)
        tokens = sum(len(e.completion_tokens) for e in examples)
        taken = collate(examples, groups, 0, "sdpa")
        alone = collate(examples, list(range(len(examples))), 0, "sdpa")
        ways: dict[str, Callable[[], float]] = {
            "ours": lambda e=examples, g=groups: ours(packed, e, g),
            "ours, prompts not shared": lambda e=examples: ours(packed, e, list(range(len(e)))),
            "TRL": lambda e=examples: padded(plain, e, full=False),
            "official": lambda e=examples: padded(plain, e, full=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        losses = {}
        for number in range(arguments.repeat + 1):
            for name, way in ways.items():
                packed.zero_grad()
                plain.zero_grad()
                started = clock()
                losses[name] = way()
                if number or arguments.repeat == 1:  # the first turn warms up
                    seconds[name].append(clock() - started)
        assert max(losses.values()) - min(losses.values()) < 1e-3 * abs(losses["ours"]), losses
        best = {name: min(values) for name, values in seconds.items()}
        counted = amount([range(len(examples))], sizes_of(examples, groups))
        flops = of_model(packed).of(counted.positions, counted.targets, counted.pairs)
        print(
            json.dumps(
                {
                    "policy": arguments.policy,
                    "lengths": kind,
                    "sequences": len(examples),
                    "completion_tokens": tokens,
                    "tokens_per_s": {name: round(tokens / value, 1) for name, value in best.items()},
                    "ours_over": {name: round(value / best["ours"], 2) for name, value in best.items()},
                    "positions": {"shared": taken.ids.numel(), "not_shared": alone.ids.numel()},
                    "mfu": round(flops / best["ours"] / peak, 3),
                    "matmul_gflops": round(peak / 1e9, 1),
                }
            ),
            flush=True,
        )


def precision(arguments: argparse.Namespace) -> None:
    """How far log-probabilities, loss and gradient of the packed step are from float64, computed one by one."""
    examples, groups = batch_of_run(arguments.run, arguments.sequences)
    exact = load_policy(Path(arguments.policy), torch.float64, "sdpa").train()
    wanted = []
    for e in examples:
        ids = torch.from_numpy(np.concatenate([e.prompt_tokens, e.completion_tokens]).astype(np.int64))[None]
        everything = torch.log_softmax(exact(input_ids=ids, use_cache=False).logits[0, :-1] / TEMPERATURE, dim=-1)
        chosen = everything.gather(-1, ids[0, 1:, None])[-len(e.completion_tokens) :, 0]
        ratio = (chosen - torch.from_numpy(e.behaviour).double()).sum()
        (BETA2 * ratio - e.advantage).square().backward()
        wanted.append(chosen.detach())
    lengths = [len(part) for part in wanted]
    gradient = {name: value.grad for name, value in exact.named_parameters()}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_policy(Path(arguments.policy), dtype, register("sdpa")).train()
        taken = collate(examples, groups, 0, "sdpa")
        chosen = Scored(model, TEMPERATURE)(taken.ids, taken.positions, taken.layout, taken.sources, taken.targets)
        logprobs = torch.zeros(taken.mask.shape).masked_scatter(taken.mask, chosen.float())
        squared(logprobs, taken.behaviour, taken.mask, taken.advantage).backward()
        off = [
            logprobs[row, :length].double() - one for row, (one, length) in enumerate(zip(wanted, lengths, strict=True))
        ]
        tokens, sums = torch.cat(off).abs().detach(), torch.stack([part.sum() for part in off]).abs().detach()
        dot = norm = other = away = 0.0
        for name, value in model.named_parameters():
            mine, theirs = value.grad.double(), gradient[name]
            dot, norm, other = dot + (mine * theirs).sum(), norm + mine.square().sum(), other + theirs.square().sum()
            away += (mine - theirs).square().sum()
        found = {
            "policy": arguments.policy,
            "dtype": str(dtype).removeprefix("torch."),
            "sequences": len(examples),
            "tokens": sum(lengths),
            "token_nats": {"mean": float(tokens.mean()), "largest": float(tokens.max())},
            "sequence_nats": {"mean": float(sums.mean()), "largest": float(sums.max())},
            "gradient": {"relative": float((away / other) ** 0.5), "cosine": float(dot / (norm * other) ** 0.5)},
        }
        print(json.dumps(found), flush=True)


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "gathering and scattering": ("index", "gather", "scatter", "aten::cat", "embedding"),
    "softmax of the vocabulary": ("log_softmax", "logsumexp", "aten::exp", "Project"),
    "copies": ("aten::copy_", "aten::clone", "aten::contiguous", "aten::fill_", "aten::zero_"),
}
"""Kinds of operations by parts of their names; what is left are sums, products and norms, element by element."""


def profile(arguments: argparse.Namespace) -> None:
    """Shares of the processor seconds of one packed forward and backward pass."""
    examples, groups = batch_of_run(arguments.run, arguments.sequences)
    model = policy_of(arguments.policy, register("sdpa"))
    ours(model, examples, groups)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        ours(model, examples, groups)
    seconds: dict[str, float] = {}
    for event in seen.key_averages():
        kind = next(
            (kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "element by element"
        )
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    whole = sum(seconds.values())
    print(f"{arguments.policy}: {whole:.2f} s of {len(examples)} sequences")
    for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {kind:28} {value / whole:6.1%}")


def one_logprobs(way: str, tokens: int, vocabulary: int, width: int, repeat: int) -> None:
    """Forward and backward pass of the head alone; prints seconds (best) and peak bytes above the start."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    weights = torch.randn(tokens)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def once() -> float:
        started = clock()
        if way == "ours":
            found = token_logprobs(head, hidden, targets, 0.7)
        elif way == "full logits":
            found = torch.log_softmax(head(hidden).float() / 0.7, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
        else:
            from trl.trainer.utils import selective_log_softmax

            found = selective_log_softmax((head(hidden) / 0.7)[None], targets[None])[0]
        (found * weights).sum().backward()
        return clock() - started

    times = [once() for _ in range(repeat)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"seconds": min(times), "peak": peak}))


def logprobs(arguments: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {"ours": [], "full logits": [], "TRL": []}
    for _ in range(arguments.repeat):
        for way in found:
            words = [sys.executable, __file__, "one", "--way", way, "--tokens", str(arguments.tokens)]
            words += [
                "--threads",
                str(arguments.threads),
                "--vocabulary",
                str(arguments.vocabulary),
                "--width",
                str(arguments.width),
            ]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {way: min(row["seconds"] for row in rows) for way, rows in found.items()}
    peaks = {way: max(row["peak"] for row in rows) for way, rows in found.items()}
    for way in found:
        print(
            f"{way:12} {seconds[way]:7.2f} s ({seconds[way] / seconds['full logits']:.2f})   "
            f"{peaks[way] / 2**20:7.0f} MiB ({peaks[way] / peaks['full logits']:.2f} of full logits)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "logprobs", "precision", "profile", "one"])
    parser.add_argument("--policy", default="tiny")
    parser.add_argument("--run", type=Path, help="a run's folder, whose first round gives lengths and tokens")
    parser.add_argument("--lengths", nargs="+", default=["equal", "round", "long-tailed"])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--median", type=int, default=48)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--way", default="ours")
    parser.add_argument("--threads", type=int, default=1, help="1: processor seconds are compared, else wall-clock.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "one":
        one_logprobs(arguments.way, arguments.tokens, arguments.vocabulary, arguments.width, 2)
    else:
        if arguments.what in ("precision", "profile") and arguments.run is None:
            parser.error(f"{arguments.what} needs --run")
        {"step": step, "logprobs": logprobs, "precision": precision, "profile": profile}[arguments.what](arguments)


if __name__ == "__main__":
    main()
