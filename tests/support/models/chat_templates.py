"""Small chat templates with the habits of those of real models, and tokenizers that have them."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
# Refuses a system's turn, trims, ends turns with its own token; its tokenizer's end is another.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _ALTERNATE
    + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Takes reasoning out of earlier turns, writes an empty one into the last; has tools and a variable.
QWEN = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}"
    "{% set thought = m.reasoning_content or parts[0].split('<think>')[-1].strip() if parts | length > 1 "
    "or m.reasoning_content else '' %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ parts[-1].lstrip('\n') }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Begins with BOS and a date; ends turns with a token that follows the text.
LLAMA = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Adds a system's turn where there is none.
SMOLLM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens a thought in the prompt, and drops it from what was answered.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Puts a system's text into the last user's turn, and only if that is the last of all; no header before an answer.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if system else messages %}{{ bos_token }}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ system + '\n\n' if system and loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
# Ends the whole text with another token than a turn.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Ends turns with plain text.
ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# Ends turns with a token that is none of the special ones, and always opens the next turn.
ERNIE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '<response>\n' + m.content + '\n</response>\n' if m.role == 'assistant' else m.content }}<|im_end|>\n\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


class Family(NamedTuple):
    """A template, its special tokens (the end of sequence first), and its other added tokens."""

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None


FAMILIES = {
    "gemma": Family(GEMMA, ("<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>"),
    "qwen": Family(QWEN, ("<|im_end|>", "<|im_start|>", "<|endoftext|>"), ("<think>", "</think>")),
    "qwen-base": Family(QWEN, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<think>", "</think>")),
    "llama": Family(
        LLAMA, ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), bos="<|bos|>"
    ),
    "smollm": Family(SMOLLM, ("<|im_end|>", "<|im_start|>")),
    "r1": Family(R1, ("<|end|>", "<|User|>", "<|Assistant|>"), ("<think>", "</think>")),
    "mistral": Family(MISTRAL, ("</s>", "[INST]", "[/INST]"), bos="<s>"),
    "phi": Family(PHI, ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "alpaca": Family(ALPACA, ("<eos>",)),
    "ernie": Family(ERNIE, ("</s>", "<s>"), ("<|im_start|>", "<|im_end|>", "<response>", "</response>")),
}


def family_tokenizer(name: str, **changes: Any) -> PreTrainedTokenizerFast:
    """Bytes and the tokens of a family; `changes` are fields of it that differ."""
    family = FAMILIES[name]._replace(**changes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [*family.special, *([family.bos] if family.bos else [])]
    core.add_tokens(list(family.added))
    core.add_special_tokens(special)
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=family.special[0], bos_token=family.bos)
    words.chat_template = family.template
    return words
