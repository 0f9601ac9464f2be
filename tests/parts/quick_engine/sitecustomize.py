"""Python imports this at its start where the folder is on PYTHONPATH: stages then get quick_engine.py for vLLM."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path


class QuickEngine:
    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        place = Path(__file__).with_name("quick_engine.py")
        return spec_from_file_location(name, place) if name == "pipeline.generation.vllm_engine" else None


sys.meta_path.insert(0, QuickEngine)
