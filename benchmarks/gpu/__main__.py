"""The learner on a card: parity, rounding, speed, memory and publishing, in ten minutes, as one JSON. See docs/gpu.md.

python -m benchmarks.gpu run --out result.json [--small] [--sections parity,head] [--minutes 9.5]
python -m benchmarks.gpu table result.json          the tables of docs/gpu.md
python -m benchmarks.gpu wheels --out DIR           what a card's machine without network needs besides
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu import tables, wheels
from benchmarks.gpu.report import Section, write
from pipeline.ending import leave
from pipeline.errors import OaplError, RequestError

SECTIONS = {
    "start": 50.0,
    "parity": 70.0,
    "training": 180.0,
    "head": 40.0,
    "accumulation": 45.0,
    "layout": 60.0,
    "publishing": 60.0,
    "optimizer": 25.0,
}
"""Each section's module and its seconds, the most telling first: what is late is left out."""
GRACE = 12.0
"""Seconds past its budget after which a section's process is ended; the last of its figures are on the disk."""
ROOT = Path(__file__).parents[2]


def main(words: Sequence[str] | None = None) -> int:
    try:
        return _answer(_arguments(words))
    except OaplError as error:
        sys.stderr.write(f"benchmarks.gpu: {error}\n")
        return error.exit_code


def _answer(arguments: argparse.Namespace) -> int:
    match arguments.verb:
        case "run":
            return run(arguments)
        case "table":
            print(tables.markdown(_read(arguments.result)))
        case "wheels":
            wheels.fetch(arguments.out, arguments.python, arguments.also)
        case "bare":
            from benchmarks.gpu.start import bare

            print(json.dumps(bare()), flush=True)
            leave()
        case "section":
            be_a_section(arguments.name, arguments.seconds, arguments.small, arguments.out)
            leave()
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("--out", type=Path, default=Path("gpu.json"))
    run.add_argument("--small", action="store_true", help="tiny shapes; always so without a card")
    run.add_argument("--sections", type=_names, default=tuple(SECTIONS), help=",".join(SECTIONS))
    run.add_argument("--minutes", type=float, default=9.5, help="for all of them")
    run.add_argument("--one-process", action="store_true", help="sections not in processes of their own")
    verbs.add_parser("table").add_argument("result", type=Path)
    fetch = verbs.add_parser("wheels")
    fetch.add_argument("--out", type=Path, required=True)
    fetch.add_argument("--python", default="3.12", help="of the card's machine")
    fetch.add_argument("--also", nargs="*", default=[], help="packages that it lacks besides, such as pyarrow")
    verbs.add_parser("bare")
    section = verbs.add_parser("section")
    section.add_argument("name")
    section.add_argument("--seconds", type=float, required=True)
    section.add_argument("--small", action="store_true")
    section.add_argument("--out", type=Path, required=True)
    return parser.parse_args(words)


def _names(told: str) -> tuple[str, ...]:
    names = tuple(told.split(","))
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return names


def run(arguments: argparse.Namespace) -> int:
    """All sections; the result is whole on the disk after each. 1 where a bound is not met or something failed."""
    end = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {"machine": {}, "sections": {}, "ok": False}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        left = end - time.monotonic() - GRACE
        seconds = left if arguments.small else min(SECTIONS[name], left)
        print(f"{name} (at most {max(0.0, seconds):.0f} s)", flush=True)
        if seconds < 5:
            result["sections"][name] = _nothing(f"no time left of {arguments.minutes:g} minutes")
        else:
            made = (_here if arguments.one_process else _apart)(name, seconds, arguments.small)
            result["machine"] = made.get("machine") or result["machine"]
            result["sections"][name] = made["section"]
        result["ok"] = all(section["ok"] for section in result["sections"].values())
        write(arguments.out, result)
    print(tables.summary(result))
    return 0 if result["ok"] else 1


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "sections" in found:
            return found
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: can't be read ({' '.join(str(error).split())}); give what `run` wrote") from None
    raise RequestError(f"{path}: no result of a run; give the file that `run --out` named")


def _nothing(why: str) -> dict[str, Any]:
    errors = [{"what": "the section", "error": why, "where": ""}]
    return {"ok": False, "seconds": 0.0, "figures": [], "bounds": [], "errors": errors, "skipped": []}


def _here(name: str, seconds: float, small: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "section.json"
        be_a_section(name, seconds, small, file)
        made: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return made


def _apart(name: str, seconds: float, small: bool) -> dict[str, Any]:
    """In a process of its own: a card that refuses to go on, a compiler that hangs or a full memory ends it alone."""
    with tempfile.TemporaryDirectory() as folder:
        file, said = Path(folder) / "section.json", Path(folder) / "stderr"
        words = [sys.executable, "-u", "-m", "benchmarks.gpu", "section", name, f"--seconds={seconds}", f"--out={file}"]
        started = time.monotonic()
        with said.open("w") as stderr:
            child = subprocess.Popen(
                words + ["--small"] * small, cwd=ROOT, stderr=stderr, start_new_session=True, env=_environment()
            )
            try:
                child.wait(seconds + GRACE)
                why = None if child.returncode == 0 else f"its process ended with {child.returncode}"
            except subprocess.TimeoutExpired:
                why = f"its process was ended after {seconds + GRACE:.0f} s"
            finally:
                _end(child)
        made = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"section": _nothing(why or "")}
        if why is not None:
            lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
            told = f"{why}: {lines[-1][:300]}" if lines else why
            print(f"  FAILED: {told}")
            made["section"]["errors"].append({"what": "the section", "error": told, "where": ""})
            made["section"] |= {"ok": False, "seconds": round(time.monotonic() - started, 2)}
    return made


def _environment() -> dict[str, str]:
    """The child's: the same modules wherever it was started, memory that fragments less, as many threads as before."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}


def _end(child: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def be_a_section(name: str, seconds: float, small: bool, file: Path) -> None:
    """Measures it in this process; what it finds is in `file`."""
    import torch

    from benchmarks.gpu.device import describe

    small = small or not torch.cuda.is_available()
    section = Section(name, seconds, file, describe(small))
    section.save()
    with section.step("the section"):
        from benchmarks.gpu.policies import Scale, usual_kernel  # what the learner imports may be what is missing

        section.machine["kernel"] = usual_kernel()
        import_module(f"benchmarks.gpu.{name}").measure(section, Scale(small))
    section.save()


if __name__ == "__main__":
    sys.exit(main())
