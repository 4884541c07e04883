"""Small tokenizers that spell bytes as those of real models do."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

META = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(spaced: bool = False, **special: str) -> PreTrainedTokenizerFast:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ðŁ", "Ġa"]
    core = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("ð", "Ł"), ("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def sentencepiece(scheme: str = "first", **special: str) -> PreTrainedTokenizerFast:
    """With byte fallback, as Llama 2 and Mistral have it. scheme: "first", "always", or "legacy", a normaliser's."""
    pieces = ["<unk>", *BYTES, META, *"abcx", f"{META}a", "ab"]
    merges = [(META, "a"), ("a", "b")]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    core = Tokenizer(model)
    if scheme == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend(META), normalizers.Replace(" ", META)])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(META, scheme, split=False)
    steps = [decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"unk_token": "<unk>", **special})
