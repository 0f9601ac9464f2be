"""Public problem sets as prompts: math of problem and answer (DeepScaleR, AIME, HMMT, BRUMO), and LiveCodeBench,
DeepCoder, APPS, TACO, HumanEval, MBPP.

A loader takes one record as the set publishes it and returns (what to ask, the answer as text or the tests in one of
our forms). Nothing in a record is executed here, and LiveCodeBench's pickled tests are read by a parser that knows
texts only.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import pickletools
import textwrap
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RequestError
from pipeline.prompts.files import make_prompt, write_prompts

if TYPE_CHECKING:
    from pipeline.prompts.files import Prompt

Loaded = tuple[str, dict[str, Any] | str]
MOST_BYTES = 1 << 30
"""Size that LiveCodeBench's tests of one problem may unpack to."""

ASK_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""What Qwen's and DeepSeek's model cards advise to ask after a problem of mathematics."""
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


def math(record: dict[str, Any]) -> Loaded:
    """Sets of problem and answer. Fields: `problem` (or `question`) and `answer`, in any case; AIME's are integers."""
    fields = {name.lower(): value for name, value in record.items()}
    problem = fields["problem"] if "problem" in fields else fields["question"]
    answer = fields["answer"]
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("no text under problem")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"no answer: {answer!r}")
    return f"{problem.strip()}\n\n{ASK_BOXED}", str(answer).strip()


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
    "math": math,
    "livecodebench": livecodebench,
    "deepcoder": deepcoder,
    "apps": apps,
    "taco": apps,
    "humaneval": humaneval,
    "mbpp": mbpp,
}


def read_dataset(
    kind: str, file: Path, split: str = "train", source: str = "", skipped: list[str] | None = None
) -> Iterator[Prompt]:
    """Prompts of a set's file (.jsonl, .jsonl.gz or .parquet, as published), one at a time.

    `source` is what the prompts say they are from, the kind unless given. Raises RequestError that names the row of
    the first record it can't use; with a list in `skipped` such rows are left out, and why goes into it.
    """
    if kind not in DATASETS:
        raise RequestError(f"no dataset {kind!r}; known: {', '.join(DATASETS)}")
    for number, record in enumerate(_records(file), 1):
        try:
            ask, reference = DATASETS[kind](record)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, binascii.Error, zlib.error) as error:
            reason = f"{file}, row {number}: no record of {kind} ({type(error).__name__}: {error})"[:300]
            if skipped is None:
                raise RequestError(reason) from None
            skipped.append(reason)
            continue
        told = {"answer": reference} if isinstance(reference, str) else {"tests": json.dumps(reference)}
        task = "math" if isinstance(reference, str) else "code"
        yield make_prompt(task, [("user", ask)], **told, source=source or kind, split=split)


def import_prompts(
    kind: str, files: Sequence[tuple[str, Path]], out: Path, split: str, skipped: list[str] | None = None
) -> dict[str, int]:
    """Writes the prompts of (source, file) pairs into one prompt file, each prompt once; returns the count by source.

    Raises RequestError where a file can't be read, or where no prompt is left.
    """
    counts: dict[str, int] = {source: 0 for source, _ in files}
    seen: set[str] = set()

    def prompts() -> Iterator[Prompt]:
        for source, file in files:
            for prompt in read_dataset(kind, file, split, source, skipped):
                if prompt.prompt_id not in seen:
                    seen.add(prompt.prompt_id)
                    counts[source] += 1
                    yield prompt

    write_prompts(out, prompts())
    if not seen:
        out.unlink()
        raise RequestError(f"{', '.join(str(file) for _, file in files)}: no record that can be used")
    return counts


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=64):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise RequestError(f"{file}: can't be read as Parquet ({str(error).splitlines()[0]})") from None
        return
    import gzip

    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: can't be read ({error})") from None
