"""Public sets of programming problems as prompts: LiveCodeBench, DeepCoder, APPS, TACO, HumanEval, MBPP.

A loader takes one record as the set publishes it and returns (what to ask, the tests in one of our forms). Nothing
in a record is executed here, and LiveCodeBench's pickled tests are read by a parser that knows texts only.
"""

from __future__ import annotations

import ast
import base64
import binascii
import itertools
import json
import pickletools
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RequestError

if TYPE_CHECKING:
    from pipeline.prompts import Prompt

Loaded = tuple[str, dict[str, Any]]
MOST_BYTES = 1 << 30
"""Size that LiveCodeBench's tests of one problem may unpack to."""

_ASK_PROGRAM = "Write a Python program that reads standard input and prints the answer. Put it in a ```python block."
_ASK_FUNCTION = "Complete this Python code. Put all of it in a ```python block.\n\n```python\n{}\n```"
_OPCODES = {"PROTO", "FRAME", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "MEMOIZE", "BINPUT",
            "LONG_BINPUT", "PUT", "STOP"}  # fmt: skip


def text_of_pickle(data: bytes) -> str:
    """The text that a pickle holds, read without the pickle machine: one text, or ValueError."""
    texts = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise ValueError(f"a pickle of more than one text ({opcode.name})")
        if isinstance(argument, str) and "UNICODE" in opcode.name:
            texts.append(argument)
    if len(texts) != 1:
        raise ValueError(f"a pickle of {len(texts)} texts instead of one")
    return texts[0]


def livecodebench_private(text: str) -> Any:
    """LiveCodeBench's `private_test_cases`: JSON, or base64 of zlib of a pickle of JSON."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
    if not unpacker.eof:
        raise ValueError(f"tests that are cut off, or of more than {MOST_BYTES >> 20} MiB")
    return json.loads(text_of_pickle(data))


def _from_cases(cases: list[dict[str, Any]], fn_name: str | None) -> dict[str, Any]:
    tests: dict[str, Any] = {
        "inputs": [case["input"] for case in cases],
        "outputs": [case["output"] for case in cases],
    }
    return tests if fn_name is None else {**tests, "fn_name": fn_name}


def _ask(question: str, starter: str | None) -> str:
    ask = _ASK_FUNCTION.format(starter.rstrip()) if starter and starter.strip() else _ASK_PROGRAM
    return f"{question.strip()}\n\n{ask}"


def livecodebench(record: dict[str, Any]) -> Loaded:
    """Fields: question_content, starter_code, metadata, public_test_cases, private_test_cases."""
    public = json.loads(record["public_test_cases"])
    cases = public + livecodebench_private(record["private_test_cases"])
    metadata = record.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    return _ask(record["question_content"], record.get("starter_code")), _from_cases(cases, name)


def deepcoder(record: dict[str, Any]) -> Loaded:
    """All three subsets: primeintellect (cases with `type`), taco (`inputs`, `outputs`), lcbv5 (`testtype`)."""
    tests = json.loads(record["tests"])
    if isinstance(tests, dict):
        return _ask(record["problem"], record.get("starter_code")), _inputs_outputs(tests)
    first = tests[0]
    name = first.get("fn_name")
    if first.get("testtype") == "functional":
        metadata = first.get("metadata") or record.get("metadata") or {}
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata)["func_name"]
    return _ask(record["problem"], record.get("starter_code")), _from_cases(tests, name)


def _inputs_outputs(tests: dict[str, Any]) -> dict[str, Any]:
    kept = {name: tests[name] for name in ("inputs", "outputs")}
    return {**kept, "fn_name": tests["fn_name"]} if tests.get("fn_name") else kept


def apps(record: dict[str, Any]) -> Loaded:
    """APPS and TACO. Fields: question, input_output, starter_code."""
    return _ask(record["question"], record.get("starter_code")), _inputs_outputs(json.loads(record["input_output"]))


def humaneval(record: dict[str, Any]) -> Loaded:
    """Fields: prompt, entry_point, test. Helpers that the prompt defines before the function go with the test, which
    may call them: the candidate's own are out of its reach."""
    name, prompt = record["entry_point"], record["prompt"]
    helpers = prompt[: prompt.rindex(f"def {name}(")]
    return _ask("", prompt).strip(), {"entry_point": name, "test": f"{helpers}\n\n{record['test']}"}


def mbpp(record: dict[str, Any]) -> Loaded:
    """Fields: text (or prompt), code, test_list, test_setup_code (or test_imports)."""
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
    asserts = list(record["test_list"])
    name = _called(record["code"], asserts)
    body = textwrap.indent("\n".join([f"global {name}", f"{name} = candidate", *asserts]), "    ")
    ask = record.get("text") or record["prompt"]
    tests = {"entry_point": name, "test": f"{setup}\n\ndef check(candidate):\n{body}\n"}
    shown = "\n".join(asserts)
    return f"{ask.strip()}\nPut the code in a ```python block. It must pass:\n\n{shown}", tests


def _called(code: str, asserts: list[str]) -> str:
    """The function that the tests call, of those that the reference code defines; the code is only parsed."""
    defined = {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(ast.parse("\n".join(asserts))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in defined:
            return node.func.id
    raise ValueError("tests that call no function of the reference code")


DATASETS: dict[str, Callable[[dict[str, Any]], Loaded]] = {
    "livecodebench": livecodebench,
    "deepcoder": deepcoder,
    "apps": apps,
    "taco": apps,
    "humaneval": humaneval,
    "mbpp": mbpp,
}


def read_dataset(kind: str, file: Path, split: str = "train") -> Iterator[Prompt]:
    """Prompts of a set's file (.jsonl, .jsonl.gz or .parquet, as published), one at a time.

    Raises RequestError that names the row of the first record it can't use.
    """
    from pipeline.prompts import make_prompt

    if kind not in DATASETS:
        raise RequestError(f"no dataset {kind!r}; known: {', '.join(DATASETS)}")
    for number, record in enumerate(_records(file), 1):
        try:
            ask, tests = DATASETS[kind](record)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, binascii.Error, zlib.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(f"{file}, row {number}: no record of {kind} ({reason:.200})") from None
        yield make_prompt("code", [("user", ask)], tests=json.dumps(tests), source=kind, split=split)


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as table:
            yield from itertools.chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(batch_size=64))
        return
    import gzip

    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: can't be read ({error})") from None
