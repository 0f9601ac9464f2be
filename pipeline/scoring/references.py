"""What rollouts are judged by: each prompt's task, answer and tests, kept on disk and found by its id."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pipeline.errors import RequestError
from pipeline.prompts.files import iter_prompts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


Places = tuple["npt.NDArray[np.uint64]", "npt.NDArray[np.int64]"]
"""Keys of prompt_ids in rising order, and where in the references each one's line begins."""


class References:
    """What each prompt is judged by, on disk; memory holds a few words for each prompt."""

    def __init__(self, prompts: Path) -> None:
        self.prompts = prompts
        self._places: dict[str, int] = {}
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._last: tuple[str, tuple[str, str | None, str | None]] | None = None
        self.tasks: set[str] = set()
        for prompt in iter_prompts(prompts):
            self._places[prompt.prompt_id] = self._file.tell()
            self._file.write(json.dumps([prompt.task, prompt.answer, prompt.tests]).encode() + b"\n")
            self.tasks.add(prompt.task)

    def lend(self, place: Path) -> Places:
        """Copies the file to where other machines can read it; returns where each prompt's line begins."""
        import numpy as np

        from pipeline.rollouts.tables import key64

        self._file.seek(0)
        with place.open("wb") as copy:
            shutil.copyfileobj(self._file, copy, 1 << 20)
        keys, offsets = key64(self._places), np.fromiter(self._places.values(), np.int64, len(self._places))
        order = np.argsort(keys)
        return keys[order], offsets[order]

    def find(self, prompt_id: str) -> tuple[str, str | None, str | None]:
        """(task, answer, tests). Raises RequestError for a prompt that is not in the file."""
        if self._last is None or self._last[0] != prompt_id:
            if prompt_id not in self._places:
                raise RequestError(f"{self.prompts}: no prompt {prompt_id!r}, which a rollout answers")
            self._file.seek(self._places[prompt_id])
            task, answer, tests = json.loads(self._file.readline())
            self._last = prompt_id, (task, answer, tests)
        return self._last[1]

    def close(self) -> None:
        self._file.close()
