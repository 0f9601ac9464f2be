"""A result as tables for people: the end of a run, and the Markdown of docs/gpu.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.report import show


def summary(result: dict[str, Any]) -> str:
    """All bounds, and what failed."""
    lines = [f"\n{result['machine'].get('device', 'no machine')}: {'all bounds met' if result['ok'] else 'NOT ok'}"]
    for name, section in result["sections"].items():
        lines.append(f"{name}, {section['seconds']:.0f} s")
        lines += [f"  {verdict(bound):<15} {told(bound)}" for bound in section["bounds"]]
        lines += [f"  failed          {error['what']}: {error['error']}" for error in section["errors"]]
        lines += [f"  left out        {one['what']}: {one['why']}" for one in section["skipped"]]
    return "\n".join(lines)


def verdict(bound: dict[str, Any]) -> str:
    return {True: "met", False: "NOT MET", None: "not applicable"}[bound["ok"]]


def told(bound: dict[str, Any]) -> str:
    value = show(bound["value"]) if bound["value"] is not None else bound["why"]
    return f"{bound['what']}: {value} ({bound['sense']} {show(bound['bound'])})"


def markdown(result: dict[str, Any]) -> str:
    return "\n".join(_markdown(result))


def _markdown(result: dict[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if version)
    memory = f", {machine['memory'] / 2**30:.0f} GiB" if "memory" in machine else ""
    yield f"{machine.get('device', 'No machine')}{memory}; Python {machine.get('python')}, {packages}."
    yield from ("", "| goal | found | bound | |", "|---|---|---|---|")
    for section in result["sections"].values():
        for bound in section["bounds"]:
            value = show(bound["value"]) if bound["value"] is not None else bound["why"]
            yield f"| {bound['what']} | {value} | {bound['sense']} {show(bound['bound'])} | {verdict(bound)} |"
    for name, section in result["sections"].items():
        yield from ("", f"### {name}", "")
        yield from _table(section["figures"])
        for error in section["errors"]:
            yield f"- {error['what']} failed: {error['error']}"
        for one in section["skipped"]:
            yield f"- {one['what']} was left out: {one['why']}"


def _table(figures: list[dict[str, Any]]) -> Iterator[str]:
    if not figures:
        return
    names = list(dict.fromkeys(name for row in figures for name in row))
    yield "| " + " | ".join(name.replace("_", " ") if name != "what" else "" for name in names) + " |"
    yield "|" + "---|" * len(names)
    for row in figures:
        yield "| " + " | ".join(show(row.get(name)) for name in names) + " |"
