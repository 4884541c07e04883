"""What a model answers to chats, and what it has forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tasks import TASKS
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl.trainer.data.samples import Sample
from fastkl.trainer.runs.files import read_jsonl

Chat = list[dict[str, str]]
BLOCK, BLOCKS = 200, 3  # tokens of the novel
SOLUTIONS = 6
SOLVED = Path("runs/smollm2/heldout.jsonl")


class Model:
    """A saved student, or the model as it was, with its tokenizer."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(path).eval()

    def answers(self, chats: Sequence[Chat], max_new_tokens: int, *, sampled: bool = False) -> list[str]:
        """The likeliest tokens, or at temperature 1 `sampled` from all of them."""
        inputs = self.tokenizer.apply_chat_template(
            list(chats), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if sampled else {"do_sample": False}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **how, max_new_tokens=max_new_tokens)
        texts: list[str] = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    def sample(self, chat: Chat, completion: str) -> Sample:
        """The chat and its completion as they are counted."""
        given = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        counted = self.tokenizer(completion)["input_ids"]
        return Sample([*given, *counted], [False] * len(given) + [True] * len(counted), 0)

    def kept(self) -> dict[str, float]:
        """What it knows besides: perplexities of a novel and of worked solutions, and capitals of countries."""
        return {
            "novel_perplexity": self._perplexity(self._novel()),
            "solutions_perplexity": self._perplexity(self._solutions()),
            "capitals": self._capitals(),
        }

    def _perplexity(self, texts: Sequence[tuple[list[int], int]]) -> float:
        """Per token; each text is ids and how many of them are given."""
        total, count = 0.0, 0
        for ids, given in texts:
            with torch.inference_mode():
                logits = self.model(torch.tensor([ids])).logits[0, given - 1 : -1].float()
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[given:]), reduction="sum").item()
            count += len(ids) - given
        return math.exp(total / count)

    def _novel(self) -> list[tuple[list[int], int]]:
        """English as in "In the Year 2889" (Jules Verne), no chat."""
        text = files("reasoning_gym.data").joinpath("in_the_year_2889.txt").read_text(encoding="utf-8")
        ids = self.tokenizer(text[10_000:30_000])["input_ids"]
        return [(ids[start : start + BLOCK], 1) for start in range(0, BLOCK * BLOCKS, BLOCK)]

    def _solutions(self) -> list[tuple[list[int], int]]:
        """Word problems of reasoning-gym in a chat, with their worked solutions."""
        found = []
        for row in read_jsonl(SOLVED)[:SOLUTIONS]:
            chat = [{"role": "user", "content": row["prompt"]}]
            prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            given = self.tokenizer(prompt)["input_ids"]
            found.append((given + self.tokenizer(row["completion"])["input_ids"], len(given)))
        return found

    def _capitals(self) -> float:
        """The share of countries after whose name their capital is likelier than all other capitals, by its first token."""
        countries = TASKS["capital"]
        firsts = [self.tokenizer(f" {capital}")["input_ids"][0] for capital in countries.values()]
        texts = [f"The capital of {country} is" for country in countries]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**inputs).logits[:, -1, firsts]
        return (logits.argmax(-1) == torch.arange(len(firsts))).float().mean().item()
