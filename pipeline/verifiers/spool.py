"""Verdicts arrive as they are ready and are read back in the cases' order, with eight bytes of memory a case."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.verifiers.cases import Verdict


class Spool:
    """A file of verdicts beside the output, each under its case's number. A context manager.

    `journal`: text that says what is judged how. A spool left behind by an interrupted run with the same journal
    is taken up again (`done`), any other is thrown away. None: never taken up, and deleted at the end.
    """

    def __init__(self, path: Path, journal: str | None = None) -> None:
        self.path = path
        self._offsets = array("Q")
        self._keep = journal is not None
        head = json.dumps(journal).encode() + b"\n"
        self._file = path.open("r+b" if self._keep and path.exists() else "w+b")
        if self._file.readline() != head:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(head)
        self._take_up()

    def _take_up(self) -> None:
        end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # torn by the interruption
            self._note(int(line[: line.index(b" ")]), end)
            end += len(line)
        self._file.seek(end)
        self._file.truncate()

    def _note(self, number: int, offset: int) -> None:
        if number >= len(self._offsets):
            self._offsets.extend([0] * (number + 1 - len(self._offsets)))
        self._offsets[number] = offset

    def done(self, number: int) -> bool:
        """Whether the case has its verdict."""
        return number < len(self._offsets) and self._offsets[number] > 0

    def add(self, verdict: Verdict) -> None:
        """Keeps the verdict; its id is the case's number."""
        self._note(int(verdict.id), self._file.tell())
        fields = {name: value for name, value in asdict(verdict).items() if name != "id"}
        self._file.write(f"{verdict.id} {json.dumps(fields)}\n".encode())

    def in_order(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, the verdict's fields without its id) of each case judged, by number."""
        self._file.flush()
        with self.path.open("rb") as reader:
            for number, offset in enumerate(self._offsets):
                if offset:
                    reader.seek(offset)
                    yield number, json.loads(reader.readline().partition(b" ")[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._keep or kind is None:
            self.path.unlink(missing_ok=True)
