"""A plan in a terminal: each number with what it was computed from, memory by ZeRO stage, advice, plan against fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.planning.measured import Comparison
from pipeline.planning.memory import HEADROOM
from pipeline.planning.terms import Given, Memory, Plan
from pipeline.policies.shapes import GIB, show_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PARTS = {
    "model": "Model",
    "tokens": "Tokens and steps",
    "time": "Time",
    "engine": "Memory of the engine",
    "disk": "Disk",
}
MEMORY_ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "AdamW's moments and float32 masters"),
    ("gathered", "weights gathered for the time being"),
    ("bucket", "DeepSpeed's reduction bucket"),
    ("logits", "logits kept and made at a time"),
    ("head_gradient", "gradient of the output matrix, float32"),
    ("activations", "activations"),
    ("activations_checkpointed", "activations, checkpointed"),
    ("layer", "checkpointed: of the layer at work"),
    ("step", "the step's float32 gradients, later"),
    ("host", "host's memory, all ranks"),
)


def show(plan: Plan, given: Given, compared: Sequence[Comparison], console: Console) -> None:
    """Prints the plan; `compared` is plan against fact of a run's rounds, and may be empty."""
    console.print(f"[bold]{plan.recipe}[/bold]: {plan.shape.name} ({plan.shape.source})", highlight=False)
    if given.source:
        console.print(f"lengths and throughputs: {given.source}", highlight=False)
    for part, title in PARTS.items():
        console.print(_lines(plan, part, title))
        if part == "time":
            console.print(_memory(plan, given))
            console.print(_formulas(plan))
    for line in plan.advice:
        console.print(f"- {line}", highlight=False, markup=False)
    if compared:
        console.print(_against(compared))


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _lines(plan: Plan, part: str, title: str) -> Table:
    table = _table(title)
    table.add_column("")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    table.show_header = False
    for line in plan.lines:
        if line.part == part:
            table.add_row(line.name, show_number(line.value, line.unit), line.how)
    return table


def show_number(value: float, unit: str) -> str:
    if unit == "bytes":
        return show_bytes(value)
    if unit == "hours" and value < 0.1:
        value, unit = value * 3600, "seconds"
    text = f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
    return f"{text} {'h' if unit == 'hours' else 's' if unit == 'seconds' else unit}".strip()


def _memory(plan: Plan, given: Given) -> Table:
    note = "; bfloat16 runs as ZeRO 1 at the least" if plan.memory[0].stage else ""
    table = _table(f"Memory of a rank of the learner, a pass of {plan.pass_tokens:,} tokens{note}")
    table.add_column("")
    for number in range(4):
        mark = " (recipe)" if number == plan.stage else ""
        table.add_column(f"ZeRO {number}{mark}", justify="right", no_wrap=True)
    for key, name in MEMORY_ROWS:
        values = [getattr(stage, key) for stage in plan.memory]
        if any(values):
            table.add_row(name, *(show_bytes(value) if value else "" for value in values))
    for checkpointing, name in ((False, "in all"), (True, "in all, checkpointed")):
        mark = " (recipe)" if checkpointing == plan.checkpointing else ""
        table.add_row(name + mark, *(_total(stage, checkpointing, given) for stage in plan.memory), style="bold")
    return table


def _formulas(plan: Plan) -> Table:
    table = _table("Where it comes from")
    table.add_column("")
    table.add_column("", overflow="fold")
    table.show_header = False
    names = dict(MEMORY_ROWS) | {"total": "in all", "total_checkpointed": "in all, checkpointed", "learned": "P"}
    used = {key for key, _ in MEMORY_ROWS if any(getattr(stage, key) for stage in plan.memory)} | {
        "total",
        "total_checkpointed",
        "learned",
    }
    for key, how in plan.memory_formulas.items():
        if key in used:
            table.add_row(names[key], how)
    return table


def _total(stage: Memory, checkpointing: bool, given: Given) -> str:
    total = stage.total(checkpointing)
    if given.gpu_memory is None:
        return show_bytes(total)
    return f"{show_bytes(total)} {'fits' if total <= HEADROOM * given.gpu_memory * GIB else 'too much'}"


def _against(compared: Sequence[Comparison]) -> Table:
    table = _table("Plan against fact")
    table.add_column("round", justify="right")
    table.add_column("")
    for name in ("plan", "fact", "fact / plan"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in compared:
        ratio = "" if item.ratio is None else f"{item.ratio:.2f}"
        numbers = show_number(item.planned, item.unit), show_number(item.fact, item.unit)
        table.add_row(str(item.round), item.name, *numbers, ratio)
    return table
