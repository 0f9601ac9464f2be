"""The forms that rollouts come in and go out as, by the name that `--format` takes."""

from __future__ import annotations

from pipeline.sharing.exchange import official, trl, verl
from pipeline.sharing.exchange.form import Form

FORMS: dict[str, Form] = {"official": official.FORM, "verl": verl.FORM, "trl": trl.FORM, "jsonl": trl.LINES}
