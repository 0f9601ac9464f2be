"""Plans: the arithmetic against numbers worked out by hand, real models, what autograd keeps, and a run's rounds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RequestError
from pipeline.evaluation.pass_at_k import evaluate
from pipeline.generation.batch import Work
from pipeline.generation.engine import Completion, Request
from pipeline.generation.generate import generate
from pipeline.layout import Run
from pipeline.planning.arithmetic import plan
from pipeline.planning.measured import compare, finished_rounds
from pipeline.planning.memory import learner_memory
from pipeline.planning.terms import Given, Plan
from pipeline.policies import snapshots
from pipeline.policies.shapes import GIB, KNOWN, Shape, shape_of, show_bytes
from pipeline.prompts.files import Prompt, make_prompt
from pipeline.recipe import Recipe, load_recipe
from pipeline.runs.open import open_run
from pipeline.runs.stages import note_stage

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]

MATH, CODE = load_recipe("qwen3-4b-math"), load_recipe("r1-14b-code")


def planned(recipe: Recipe, **given: Any) -> Plan:
    return plan(recipe, shape_of(recipe), Given(**given))


@pytest.mark.parametrize(
    ("recipe", "layer", "parameters", "cache"),
    [
        # 2x2560x(4096+1024) + 3x2560x9728 + 2x2560 + 2x128; 36 of them + 151936x2560 + 2560; 2x36x1024x2
        (MATH, 100_930_816, 4_022_468_096, 147_456),
        # 2x5120x(5120+1024) + 3x5120x13824 + 2x5120 + 5120+2x1024; 48 of them + 2x152064x5120 + 5120; 2x48x1024x2
        (CODE, 275_268_608, 14_770_033_664, 196_608),
    ],
)
def test_the_two_models_are_as_large_as_published(recipe: Recipe, layer: int, parameters: int, cache: int) -> None:
    made = planned(recipe)
    assert made.value("layer_parameters") == layer
    assert made.value("parameters") == parameters
    assert made.value("cache_token") == cache


def test_ranks_that_share_sequences_share_their_activations() -> None:
    """16,384 + 2,048 tokens at most: 4,608 on each of four ranks, where the budget is smaller."""
    changes = ["learning.micro_batch_tokens=1024", "learning.ranks=8"]
    alone = planned(load_recipe("qwen3-4b-math", changes))
    shared = planned(load_recipe("qwen3-4b-math", [*changes, "learning.sequence_parallel=4"]))
    assert (alone.pass_tokens, shared.pass_tokens) == (18_432, 4_608)
    assert shared.memory[3].activations * 4 == alone.memory[3].activations


def test_the_two_recipes_are_the_papers() -> None:
    math, code = MATH, CODE
    assert (math.learning.beta1, math.learning.beta2, math.learning.learning_rate) == (1.0, 1e-3, 1e-6)
    assert (math.generation.max_tokens, math.evaluation.samples) == (16384, 10)
    assert planned(math).value("steps") == 50
    settings = code.learning
    assert (settings.beta1, settings.beta2, settings.learning_rate) == (1.0, 1e-3, 1e-6)
    assert (settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon) == (0.9, 0.95, 1e-10)
    assert (settings.weight_decay, settings.clip, settings.batch_size) == (1e-8, 1.0, 256)
    assert (settings.schedule, settings.final_learning_rate) == ("cosine", 0.05)
    assert (code.generation.samples, code.generation.temperature, code.generation.top_p) == (8, 0.6, 0.95)
    assert (code.prompts.max_tokens, code.generation.max_tokens) == (4096, 32000)
    evaluated = code.for_evaluation()
    assert (evaluated.samples, evaluated.max_tokens, evaluated.max_model_len) == (20, 65536, 4096 + 65536)
    assert code.prompts.heldout_count == 279
    for recipe in (math, code):
        assert recipe.generation.max_model_len == (recipe.prompts.max_tokens or 0) + recipe.generation.max_tokens


def test_a_round_worked_out_by_hand() -> None:
    changes = ["prompts.per_round=100", "prompts.heldout_count=10", "generation.samples=4", "learning.epochs=2"]
    changes += ["learning.batch_size=32", "evaluation.samples=5", "evaluation.ks=[1]", "rounds=3"]
    recipe = load_recipe("tiny", changes)
    given = Given(mean_tokens=50, uniform=0.25, tokens_per_second=1000, train_tokens_per_second=500, start_seconds=10)
    made = plan(recipe, shape_of(recipe), given)
    assert made.value("completions") == 400
    assert made.value("tokens") == 20_000
    assert made.value("steps") == 18  # 400 x 0.75 x 2 = 600; 600 / 32 = 18.75
    assert made.value("learned_tokens") == 18 * 32 * 50
    assert made.value("evaluation_tokens") == 10 * 5 * 50
    assert made.value("run_tokens") == 3 * 20_000 + 4 * 2_500
    assert made.value("generation_gpu_hours") == pytest.approx(20 / 3600)
    assert made.value("learning_gpu_hours") == pytest.approx((28_800 / 500 + 10) / 3600)
    assert made.value("run_gpu_hours") == pytest.approx((3 * (20 + 2.5 + 67.6) + 2.5) / 3600)
    assert made.value("rollout_bytes") == pytest.approx(20_000 * 5.3 + 400 * 22)
    # 448x128 + 4 x (2x128x(128+64) + 3x128x384 + 2x128 + 2x32) + 128 weights in float32; 8 bytes of each kept
    assert made.value("snapshot_bytes") == 845_184 * 4
    assert made.value("state_bytes") == 845_184 * 8
    disk = 3 * (2 * (114_800 + 400 * 18) + 845_184 * 4) + 845_184 * 4 + 2 * 845_184 * 8
    assert made.value("run_bytes") == pytest.approx(disk)


def test_memory_by_stage_worked_out_by_hand() -> None:
    shape = KNOWN["Qwen/Qwen3-4B-Thinking-2507"]
    p, tokens = 4_022_468_096, 18_432
    found = [learner_memory(MATH, shape, stage) for stage in range(4)]
    assert [memory.stage for memory in found] == [1, 1, 2, 3]  # bfloat16 has no stage 0
    assert [memory.weights for memory in found[1:]] == [2 * p, 2 * p, 2 * p / 8]
    assert [memory.gradients for memory in found[1:]] == [6 * p, 4 * p / 8, 4 * p / 8]  # summed in float32
    assert [memory.step for memory in found[1:]] == [0, 0, 4 * p / 8]
    assert {memory.optimizer for memory in found} == {12 * p / 8}
    assert [memory.gathered for memory in found[1:]] == [0, 0, 2e9]
    assert [memory.bucket for memory in found[1:]] == [2e9, 3e9, 3e9]  # as they come, and sent as float32
    # 2^24 / 151936 = 110 rows a chunk; 12 chunks are kept and 2 are at work, in float32, one of them in bfloat16, too
    assert found[2].logits == 4 * 151_936 * 110 * 14 + 2 * 151_936 * 110
    assert found[2].head_gradient == 151_936 * 2560 * 6
    # norms 8 bytes x 2560 x 2; query and outputs, keys and values 2 x 2 x (4096 + 1024), since varlen repeats nothing;
    # before their norms 6 x 5120; MLP 8 x 9728
    layer = 40_960 + 20_480 + 30_720 + 77_824
    assert found[2].activations == tokens * (36 * layer + 8 * 2560)
    assert found[2].activations_checkpointed == tokens * (36 * 2560 * 2 + 8 * 2560)
    assert found[2].layer == tokens * layer
    held = 2 * p + 4 * p / 8 + 12 * p / 8 + 3e9
    assert found[2].logits + found[2].head_gradient > found[2].layer
    head = found[2].logits + found[2].head_gradient
    assert found[2].total(checkpointing=True) == held + found[2].activations_checkpointed + head
    assert found[2].total(checkpointing=False) == held + found[2].activations + head
    assert show_bytes(found[2].total(checkpointing=True)) == "24.4 GiB"


def test_offload_and_adapters_move_memory_to_where_they_say() -> None:
    shape = KNOWN["Qwen/Qwen3-4B-Thinking-2507"]
    p = shape.parameters
    offloaded = load_recipe("qwen3-4b-math", ["learning.offload=all", "learning.zero_stage=3"])
    memory = learner_memory(offloaded, shape, 3)
    assert (memory.weights, memory.optimizer, memory.step) == (0, 0, 0)
    assert memory.host == pytest.approx(12 * p + 4 * p + 2 * p)
    adapted = load_recipe("qwen3-4b-math", ["learning.lora_rank=16"])
    memory = learner_memory(adapted, shape, 2)
    # rank x (in + out): query and output 2560+4096, key and value 2560+1024, three of 2560+9728; 36 layers
    few = 36 * 16 * (2 * 6656 + 2 * 3584 + 3 * 12_288)
    assert memory.gradients == 4 * few / 8
    assert memory.optimizer == 12 * few / 8
    assert memory.weights == 2 * (p + few)


def small(kind: str) -> tuple[Any, Shape]:
    """A model of some ten thousand weights and its shape, read from the config that it would save."""
    import transformers

    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    head_dim = {} if kind == "qwen2" else {"head_dim": 32}
    settings = config(**sizes, **heads, **head_dim, tie_word_embeddings=kind == "qwen3")
    return model(settings), settings


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(kind: str, dtype: str, checkpointing: bool, tmp_path: Path) -> None:
    import torch

    from trainer.attention import register
    from trainer.passes import collate
    from trainer.view import Example

    model, config = small(kind)
    config.save_pretrained(tmp_path)
    shape = shape_of(load_recipe("tiny"), tmp_path)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    model.to(getattr(torch, dtype)).train().set_attn_implementation(register("sdpa"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, none = np.arange(200, dtype=np.int32), np.zeros(200, np.float32)
    taken = collate([Example(ids[:20], ids, none, none, 0.0, 0.0)] * 4, [0, 1, 2, 3], 0, "sdpa")
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model.base_model(input_ids=taken.ids, position_ids=taken.positions, layout=taken.layout, use_cache=False)
    found = sum(value.untyped_storage().nbytes() for value in kept.values()) / taken.ids.numel()
    item = 4 if dtype == "float32" else 2
    layer = shape.hidden * item if checkpointing else shape.activations(item, flash=False)
    # Beside the layers: the last norm, and, where layers keep them, cosine and sine of the positions.
    beside = (4 + item) * shape.hidden + (0 if checkpointing else 2 * shape.head_dim * item)
    assert found == pytest.approx(shape.layers * layer + beside, rel=0.02)


def test_adapters_are_as_many_as_peft_makes() -> None:
    from trainer import adapters

    model, _ = small("qwen3")
    adapters.add(model, 4, 32)
    shape = Shape("", "qwen3", 320, 64, 2, 4, 2, 32, 96, tied=True)
    assert shape.adapters(4) == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_the_logits_are_the_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned of a card of 80 GiB is what the learner makes on one that reports 79.1 of them."""
    import torch

    from trainer import logprobs

    made = []
    monkeypatch.setattr(logprobs.Project, "apply", lambda *given: made.append(given[4:]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=79.1 * GIB))
    head = torch.nn.Linear(1, 151_936, bias=False)
    hidden = SimpleNamespace(is_cuda=True, device="cuda:0")
    logprobs._in_chunks(head, head, hidden, torch.zeros(1), 1.0)
    ((chunk, kept),) = made
    planned_logits = [learner_memory(MATH, shape_of(MATH), 1, memory).logits for memory in (80, None)]
    assert planned_logits[0] == 151_936 * (4 * (kept + 2 * chunk) + 2 * chunk)
    assert planned_logits[1] == 151_936 * (4 * (1320 + 2 * 110) + 2 * 110)


def test_the_engines_room_is_what_is_left_of_its_cards() -> None:
    made = planned(MATH, gpu_memory=80, mean_tokens=9000)
    scratch = 2 * 18_496 * (9728 + 2560) * 2 + 8 * 256 * 151_936
    room = 80 * GIB * 0.9 - 2 * 4_022_468_096 - scratch
    assert made.value("cache_room") == pytest.approx(room)
    assert made.value("fit_longest") == room // (18_432 * 147_456)
    assert made.value("fit_mean") == room // (9000 * 147_456)
    assert planned(MATH, gpu_memory=8).value("cache_room") == 0


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ([], {"gpu_memory": 80}, "learner: fits; a rank takes 27.7 GiB of 80 GiB"),
        (["activation_checkpointing=false"], {"gpu_memory": 80}, "set learning.activation_checkpointing=true, and it"),
        ([], {"gpu_memory": 24}, "set learning.zero_stage=3, and it takes 19.5 GiB"),
        (["ranks=1", "zero_stage=0"], {"gpu_memory": 48}, "learning.offload=optimizer learning.zero_stage=1, and it"),
        ([], {"gpu_memory": 4}, "take more ranks, or shorter sequences"),
        ([], {"gpu_memory": 8}, "engine: not one rollout of 18,432 tokens fits"),
        ([], {"gpu_memory": 80}, "engine: 25 of generation.max_num_seqs=256 fit at full length"),
        ([], {"gpus": 4}, "learning.ranks=8 are more than 4 cards"),
        ([], {"gpus": 8}, "`oapl run` starts one engine, on 1; for all 8"),
        ([], {}, "give --tokens-per-second"),
        ([], {}, "give --mean-tokens"),
        (["epochs=9"], {}, "a round of 450 steps lags further than the 400"),
        (["micro_batch_tokens=4096"], {}, "one sequence may have 18,432 tokens"),
    ],
)
def test_advice_says_what_to_change(changes: list[str], given: dict[str, Any], said: str) -> None:
    recipe = load_recipe("qwen3-4b-math", [f"learning.{change}" for change in changes])
    assert any(said in line for line in planned(recipe, **given).advice), planned(recipe, **given).advice


def test_what_the_advice_names_does_fit() -> None:
    recipe = load_recipe("r1-14b-code", ["learning.zero_stage=1"])
    [line] = [line for line in planned(recipe, gpu_memory=80).advice if line.startswith("learner: a rank takes")]
    changes = line.partition("; set ")[2].partition(", and it takes")[0].split()
    assert changes
    again = planned(load_recipe("r1-14b-code", ["learning.zero_stage=1", *changes]), gpu_memory=80)
    assert again.memory[again.stage].total(again.checkpointing) <= 0.9 * 80 * GIB


def test_a_config_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    recipe = load_recipe("qwen3-4b-math", [f"policy.model={tmp_path / 'gone'}"])
    with pytest.raises(RequestError, match=r"no config\.json in .*--model-config"):
        shape_of(recipe)
    file = tmp_path / "config.json"
    for text, said in (
        ("{", "can't be read"),
        ('{"model_type": "qwen3_moe"}', "model_type 'qwen3_moe'; a plan knows llama"),
        ('{"model_type": "qwen3"}', "no usable 'num_attention_heads'"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=said):
            shape_of(recipe, file)
    sizes = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    file.write_text(json.dumps({"model_type": "llama", **sizes, "num_attention_heads": 4}))
    shape = shape_of(recipe, tmp_path)
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (4, 16, False)


def test_the_command_prints_what_the_arithmetic_says(oapl: Oapl, tmp_path: Path) -> None:
    words = ["plan", "r1-14b-code", "--gpus", "8", "--gpu-memory", "80", "--mean-tokens", "8000", "--root", tmp_path]
    words += ["--tokens-per-second", "3000", "--train-tokens-per-second", "9000", "--uniform-share", "0.5"]
    done = oapl(*words, env={"COLUMNS": "150"})
    assert done.returncode == 0, done.stderr
    for said in ("14,770,033,664", "24,300 prompts x 8 samples", "192 KiB", "Memory of a rank", "ZeRO 3 (recipe)"):
        assert said in done.stdout, done.stdout
    tree = json.loads(oapl(*words, "--json").stdout)
    values = {line["key"]: line["value"] for line in tree["lines"]}
    assert values["tokens"] == 24_300 * 8 * 8000
    assert values["generation_gpu_hours"] == pytest.approx(24_300 * 8 * 8000 / 3000 / 3600 * 2)
    assert values["steps"] == 24_300 * 4 // 256
    assert len(tree["memory"]) == 4
    assert tree["measured"] == []


def test_the_page_shows_what_the_command_prints(oapl: Oapl, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8").replace("\\\n", "")
    shown = {" ".join(line.split()) for line in page.splitlines()}
    commands = [line.split() for line in shown if line.startswith("oapl plan") and "--verdicts-per-second" in line]
    assert {words[2] for words in commands} == {"qwen3-4b-math", "r1-14b-code"}
    for words in commands:
        printed = oapl(*words[1:], "--root", tmp_path, env={"COLUMNS": "118"}).stdout
        if words[2] == "r1-14b-code":  # of which the page leaves out the model, and where memory comes from
            printed = printed[printed.index("Tokens and steps") :]
            before, _, after = printed.partition("Where it comes from")
            printed = before + after[after.index("Memory of the engine") :]
        assert [line for line in printed.splitlines() if " ".join(line.split()) not in shown] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no recipe 'nothing'"),
        (["tiny", "--set", "learning.beta2=banana"], "learning.beta2"),
        (["tiny", "--gpus", "0"], "--gpus must be a number above 0"),
        (["tiny", "--gpu-memory", "-1"], "--gpu-memory must be"),
        (["tiny", "--uniform-share", "1"], "--uniform-share must be at least 0 and below 1"),
        (["tiny", "--tokens-per-second", "nan"], "--tokens-per-second must be"),
        (["tiny", "--mean-tokens", "65"], "more than generation.max_tokens 64"),
        (["qwen3-4b-math", "--model-config", "nowhere"], "no config.json in nowhere"),
        (["smollm2", "--set", "policy.model=nowhere"], "no config.json in nowhere"),
        (["tiny", "--measured", "nowhere"], "nowhere: no run's folder"),
    ],
)
def test_a_wrong_request_is_one_line(oapl: Oapl, tmp_path: Path, words: list[str], said: str) -> None:
    done = oapl("plan", *words, "--root", tmp_path)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("oapl: ")
    assert said in line


class ThreeTokens:
    """An engine whose completions all have three tokens."""

    name, version, logprobs_mode = "fake", "1", "processed_logprobs"

    def __init__(self) -> None:
        self.waiting: list[Request] = []

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> list[Completion]:
        done, self.waiting = self.waiting, []
        return [Completion(r.key, [4, 5, r.seed % 50 + 3], [-0.5, -0.25, -1.0], "stop") for r in done]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, random_policy: Path) -> Run:
    """A run of one round: 64 prompts x 4 samples, a quarter of the groups uniform, 3 epochs in batches of 16."""
    changes = ["name=measured", "policy.cold_start=null", f"policy.model={random_policy}", "prompts.per_round=64"]
    changes += ["generation.samples=4", "learning.epochs=3", "learning.batch_size=16", "evaluation.samples=2"]
    changes += ["evaluation.ks=[1]", "prompts.heldout_count=8", "rounds=2"]
    recipe = load_recipe("tiny", changes)
    run = open_run(tmp_path_factory.mktemp("data"), recipe)
    start = snapshots.adopt(random_policy, run.snapshots)
    policy = run.snapshot(start.snapshot_id)

    def prompts(first: int, count: int) -> list[Prompt]:
        return [make_prompt("math", [("user", f"What is {n} + 1?")], answer=str(n + 1)) for n in range(first, count)]

    generate(Work(policy, recipe.generation, 0, 0), prompts(0, 64), run.rollouts(0), ThreeTokens)
    evaluate(policy, prompts(64, 72), recipe, run.evaluation(0), ThreeTokens)
    steps = 64 * 4 * 3 * 3 // 4 // 16
    run.learning_log(0).parent.mkdir(parents=True)
    lines = [json.dumps({"step": n + 1, "seconds": 0.5}) for n in range(steps)]
    run.learning_log(0).write_text("\n".join(lines) + "\n", encoding="utf-8")
    learned = {"snapshot_id": start.snapshot_id, "steps": steps, "tokens": steps * 16 * 3, "uniform_groups": 16}
    run.learning_log(0).with_suffix(".json").write_text(json.dumps(learned), encoding="utf-8")
    for stage, seconds in {"generate": 10.0, "verify": 4.0, "learn": 28.0, "evaluate": 5.0}.items():
        note_stage(run, 0, stage, seconds=seconds)
    return run


def test_plan_and_fact_of_a_round_agree(run: Run) -> None:
    facts = finished_rounds(run)
    assert [(f.groups, f.tokens, f.steps, f.step_seconds) for f in facts] == [(64, 768, 36, 18.0)]
    compared = {item.name: item for item in compare(run, facts)}
    assert {name for name, item in compared.items() if item.fact != pytest.approx(item.planned)} == {"snapshot"}
    assert compared["optimizer steps"].fact == 36
    assert compared["generation"].planned == pytest.approx(10)
    assert compared["learning"].planned == pytest.approx(28)  # 36 steps of half a second, and ten seconds to start
    # The tokenizer is most of so small a policy; the weights alone are what was planned.
    weights = next(run.snapshots.glob("*/model.safetensors")).stat().st_size
    assert weights == pytest.approx(compared["snapshot"].planned, rel=0.05)


def test_a_run_gives_lengths_and_throughputs_and_what_is_given_by_hand_comes_first(run: Run, oapl: Oapl) -> None:
    words = ["plan", str(run.recipe), "--json", "--set", "prompts.per_round=128"]
    for more in (["--root", run.data], ["--measured", run.path]):
        tree = json.loads(oapl(*words, *more).stdout)
        values = {line["key"]: line["value"] for line in tree["lines"]}
        assert values["tokens"] == 128 * 4 * 3
        assert values["steps"] == 72
        assert values["generation_gpu_hours"] == pytest.approx(20 / 3600)
        assert values["verification_hours"] == pytest.approx(8 / 3600)
        assert values["learning_gpu_hours"] == pytest.approx((36 + 10) / 3600)
        assert tree["given"]["source"].endswith("runs/measured, 1 round")
    tree = json.loads(oapl(*words, "--measured", run.path, "--mean-tokens", "6", "--tokens-per-second", "512").stdout)
    values = {line["key"]: line["value"] for line in tree["lines"]}
    assert values["generation_gpu_hours"] == pytest.approx(6 / 3600)
    shown = oapl("plan", str(run.recipe), "--measured", run.path).stdout
    assert "Plan against fact" in shown
    shown = oapl("plan", "tiny", "--measured", run.path, env={"COLUMNS": "200"}).stdout
    assert "runs/measured, 1 round, of another policy" in shown


def test_an_unfinished_run_measures_nothing(tmp_path: Path, oapl: Oapl) -> None:
    begun = open_run(tmp_path, load_recipe("tiny"))
    done = oapl("plan", "tiny", "--measured", begun.path)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("no round of it is finished, so there is nothing to measure by")
    assert oapl("plan", "tiny", "--root", tmp_path).returncode == 0
