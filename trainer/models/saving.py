"""Saving a student as an ordinary Transformers folder, and the proof that the folder holds what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.errors import RunError, brief
from fastkl.trainer.models.adapters import merged, merged_state
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.scoring import scoring
from fastkl.trainer.models.tokenizers import SAMPLE_TEXT
from fastkl.trainer.models.withheld import as_loaded

PROBE_TOKENS = 24
# Nats, the median over the probe: above what merging rounds (in float32, in 16 bits), far below another model.
ROUNDING, COARSE_ROUNDING = 0.01, 0.5
NAMED = 3  # of the weights that differ


def save_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The trained model as an ordinary Transformers folder; a LoRA adapter is merged into its base, and kept beside it.

    Raises:
        RunError: If the folder is not the model that was trained. The adapter in it is whole even so.
    """
    if hasattr(model, "merge_adapter"):
        model.save_pretrained(folder / "adapter")
        ids = tokenizer(SAMPLE_TEXT)["input_ids"][:PROBE_TOKENS]
        trained = _logprobs(model, ids)
        with merged(model) as base:
            _check_merge(trained, _logprobs(model, ids), base.dtype)
            save_model(base, merged_state(base), folder)
    else:
        save_model(model, model.state_dict(), folder)
    tokenizer.save_pretrained(folder)
    _declare_ends(folder / "generation_config.json", end_of_sequence(model, tokenizer))


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """What a server needs to sample as the model does: the adapter of a PEFT model, or all weights.

    A head that is the embeddings is written under its own name too. vLLM on a CPU computes with a packed copy of the
    head, and makes it again only from a weight of that name.
    """
    if hasattr(model, "merge_adapter"):
        model.save_pretrained(folder)
    else:
        save_model(model, model.state_dict() | _tied_head(model), folder)


def save_model(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Writes a model that has the weights of `state`, then reads the files' headers as `from_pretrained` does.

    Raises:
        RunError: If a weight of the model is not there under its name and in its shape, or one that is none of them is.
    """
    written = _shapes(state)
    with as_loaded(model):
        model.save_pretrained(folder, state_dict=state)
    kind: Any = type(model)
    try:
        plain, found = kind.from_pretrained(folder, device_map="meta", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _lost(f"{kind.__name__} does not load what it saved ({brief(error)})") from error
    wanted = _shapes(plain.state_dict())
    differing = {name for name in {*written, *wanted} if written.get(name) != wanted.get(name)}
    differing |= {*found["missing_keys"], *found["unexpected_keys"]}
    if differing:
        named = ", ".join(sorted(differing)[:NAMED])
        raise _lost(f"{len(differing)} weights have other names or shapes than {kind.__name__}'s own, such as {named}")


def _tied_head(model: Any) -> dict[str, Tensor]:
    """A copy of the head's weight by its name, where it shares its memory with the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.untyped_storage().data_ptr() != embeddings.weight.untyped_storage().data_ptr():
        return {}
    (name,) = (name for name, module in model.named_modules() if module is head)
    return {f"{name}.weight": head.weight.detach().clone()}


def _declare_ends(path: Path, ends: list[int]) -> None:
    """Whoever samples from the folder stops where the run did: also where the chat template ends a turn."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    declared = settings.get("eos_token_id")
    if {*ends} - {*(declared if isinstance(declared, list) else [declared])}:
        path.write_text(json.dumps(settings | {"eos_token_id": ends}, indent=2) + "\n", encoding="utf-8")


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_merge(trained: Tensor, found: Tensor, dtype: torch.dtype) -> None:
    """The merged weights say of a text what base and adapter say of it."""
    error = float((trained - found).abs().median())  # not the mean: rounding may send a token to another expert
    if error > (ROUNDING if dtype == torch.float32 else COARSE_ROUNDING):
        raise _lost(f"merging the adapter changes the log-probs of a text by {error:.3g} nats")


def _logprobs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probs [n − 1] of a text."""
    read = torch.tensor([ids], device=model.device)
    with scoring(model):
        logits = model(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, read[0, 1:, None])[:, 0]


def _lost(what: str) -> RunError:
    return RunError(
        f"the saved student would not be the trained one: {what}. The last checkpoint is whole, and so is the adapter of a "
        f"LoRA run (student.incomplete/adapter); please report the model"
    )
