"""What works for each causal-LM family of Transformers, as tests/trainer/models/test_families.py finds it.

docs/models/models.md is made from this table. Make the page again after a change:

    python tests/support/models/family_table.py > docs/models/models.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Result = dict[str, str]

# What a family does in each column, if its group says nothing else.
USUAL: Result = {
    "gpu": "continuous batching",
    "cpu": "generate",
    "batches": "padded",
    "packed": "yes",
    "update": "yes",
    "saved": "yes",
    "lora": "yes",
}
REFUSED = dict.fromkeys(USUAL, "refused")
VERSION = "5.23.0"


class Group(NamedTuple):
    """Families with one result."""

    differs: Result  # from USUAL
    families: str

    @property
    def result(self) -> Result:
        return USUAL | self.differs

    @property
    def names(self) -> list[str]:
        return self.families.split()


GENERATE: Result = {"gpu": "generate"}
ONE_PROMPT: Result = {"gpu": "generate, one prompt", "cpu": "generate, one prompt"}
UNPACKED: Result = {"packed": "refused"}
ONE_LENGTH: Result = {"gpu": "generate, one length", "cpu": "generate, one length"}
GROUPS = (
    Group(
        {},
        """
        apertus arcee aria_text beam bitnet cohere cohere2 cohere2_moe cohere_compass cohere_compass_text ctrl cwm
        dbrx dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma gemma3 gemma3_text
        gemma3n_text glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2 gpt_neox granite granite_swa granitemoe granitemoe_swa
        granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax idefics3 internlm3 internvl
        iquestcoder jais2 kolibri1 laguna llama llava mellum minimax_m2 minimax_m3_vl_text ministral ministral3
        mistral mistral3 mixtral mllama modernbert-decoder moshi nanochat olmo olmo2 olmo3 olmoe persimmon phi phi3
        phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_vl qwen3_vl_moe seed_oss smollm3 smolvlm solar_open starcoder2
        """,
    ),
    Group(
        {**UNPACKED, **GENERATE},
        """
        bailing_hybrid bamba big_bird bloom falcon falcon_h1 falcon_mamba granitemoehybrid inkling2_text
        inkling_text jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2 megatron-bert mpt nemotron_h olmo_hybrid
        openai-gpt qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text rembert xglm zamba
        zamba2 zaya
        """,
    ),
    Group(
        GENERATE,
        """
        axk1 axk2 codegen deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots3_note_text gemma2
        gemma4 gemma4_text gemma4_unified_text glm4_moe_lite glm_moe_dsa gpt_bigcode gpt_neo gpt_neox_japanese gptj
        hrm_text hy_v4 jetmoe llama4 llama4_text longcat_flash mimo_v2_flash minicpm3 nemotron stablelm vaultgemma
        youtu
        """,
    ),
    Group(
        UNPACKED,
        """
        afmoe bert bert-generation biogpt electra ernie glm4v gpt_oss opt qwen2_5_vl qwen2_vl roc_bert
        """,
    ),
    Group(
        {**UNPACKED, **ONE_LENGTH},
        """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart minimax mvp pegasus plbart recurrent_gemma roformer
        trocr
        """,
    ),
    Group(
        {**UNPACKED, **ONE_PROMPT},
        """
        rwkv
        """,
    ),
    Group(
        ONE_LENGTH,
        """
        whisper
        """,
    ),
)
CACHE = "Transformers' forward pass with a cache gives other log-probs than the one without"
POSITIONS = "encoders used as decoders, whose positions do not begin at 0"
REFUSED_FAMILIES = {
    **dict.fromkeys(("cpmant", "paligemma", "xlm", "xlnet"), CACHE),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), POSITIONS),
    "xlstm": "`generate` fails on it",
}
OWN_SIZES = "not made small: parts of it have sizes of their own (if its text part is a family, it is in the table)"
PART = "part of a model that reads something else than text"
LEFT_OUT = {
    **dict.fromkeys(("blt", "dots3_note", "gemma4_unified", "git", "qwen4_exp"), OWN_SIZES),
    **dict.fromkeys(("moss_transcribe_diarize", "phi4_multimodal"), OWN_SIZES),
    **dict.fromkeys(("musicgen", "musicgen_melody", "prophetnet"), PART),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts tokens for another model"),
    "emu3": "needs its vocabulary of images",
    "gemma3n": "needs the package timm (its text part is in the table)",
    "reformer": "its update fails: its backward pass works in training mode alone",
}
EXPECTED = {name: group.result for group in GROUPS for name in group.names} | dict.fromkeys(REFUSED_FAMILIES, REFUSED)

HEAD = """\
# Models

Student and teacher may be any causal language model of Transformers, or a model that reads images or sound as well as text.
This page says what works for which family, and which tokenizers fit together. [students.md](students.md) says which weights
are trained and saved.

## What you may bring

| you have | then |
|---|---|
| a folder or Hub id that Transformers loads | give it as `student.path` or `teacher.path` |
| a model with code of its own | set `trust_remote_code` |
| a head that is not one linear layer, or logits changed in other ways than by a scale or a soft-cap | it is refused |
| a GGUF file | convert it to a folder first, as [recipes/smollm2](../../recipes/smollm2/make.py) does |
| a quantised folder | it can be a teacher: see [teachers.md](../teachers/teachers.md#where-a-teacher-is) |

## What is checked at the start

What goes wrong differs between families. So it is not a family's name that decides, but the model's answers to a few short
texts: see [rollouts.md](../data/rollouts.md#one-distribution). A model that is in no table below is checked in the same
way.

Phi-3 with 128k of context and others with `rope_type: longrope` rotate a whole batch by other frequencies as soon as one
of its texts is longer than `original_max_position_embeddings`. A distillation is refused where some prompt is shorter than
that and some prompt with `sampling.max_new_tokens` longer.

## Student and teacher together

The teacher scores the ids that the student sampled. So before any model is loaded their tokenizers are compared:

- an id that both have must be the same token;
- an id that only the student has is refused;
- the teacher may have more tokens;
- a text must get the same ids, and the special tokens must have the same ids.

A teacher with another tokenizer needs `teacher.tokenizer: own`: see [tokenizers.md](../teachers/tokenizers.md).

Names that fill up a head, as `[PAD151936]` of GGUF files, are no tokens. Nor is a padding token of the student's own. How a
token is spelled may differ: `Ġthe` and ` the` are one token.

Every id of the tokenizer needs a logit in both models. Special tokens that no row has are excepted: Gemma 3's small models
have none for `<image_soft_token>`.

Bidirectional encoders are refused: a BERT needs `is_decoder: true` in its config.

## Families

Each family was built small, with random weights in float32, and put through all of it on a CPU, with Transformers
TRANSFORMERS. The choice for an accelerator was made on the CPU too: none of this was run on a GPU.

| column | says |
|---|---|
| sampled on a GPU, on a CPU | how `sampling.engine: auto` samples there; the log-probs are those of a plain forward pass |
| rows | what `batch.layout: auto` takes, without flash attention |
| packed | whether `batch.layout: packed` works |
| LoRA | whether `lora.target_modules: all-linear` trains an adapter that is merged, saved and loaded without a difference |

In all of these families the update sees the log-probs that were sampled with, and moves the weights. The saved folder is
the trained model.

Zamba 2 and Nemotron-H decode with differences of up to 3e-4 nats from a plain forward pass, measured on tiny models."""
COLUMNS = {"gpu": "sampled on a GPU by", "cpu": "on a CPU by", "batches": "rows", "packed": "packed", "lora": "LoRA"}


def page() -> Iterator[str]:
    """The lines of docs/models/models.md."""
    yield HEAD.replace("TRANSFORMERS", VERSION)
    count = sum(len(group.names) for group in GROUPS)
    yield from ("", f"{count} families, by what they can do:", "")
    yield f"| {' | '.join(COLUMNS.values())} | families |"
    yield f"|{'---|' * (len(COLUMNS) + 1)}"
    for group in GROUPS:
        cells = (group.result[column] for column in COLUMNS)
        yield f"| {' | '.join(cells)} | {', '.join(group.names)} |"
    for title, families in (("Refused", REFUSED_FAMILIES), ("Not in the table", LEFT_OUT)):
        yield from ("", f"{title}:", "", "| families | why |", "|---|---|")
        reasons = dict.fromkeys(families.values())
        for reason in reasons:
            yield f"| {', '.join(name for name, why in families.items() if why == reason)} | {reason} |"


if __name__ == "__main__":
    print(*page(), sep="\n")
