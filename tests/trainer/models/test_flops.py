"""FLOPs: the formulas against what torch counts in the model's own passes, and the metrics of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composites import COMPOSITES, composite
from families import make_model
from peft import LoraConfig, get_peft_model
from run_cases import Run, run, tuned
from run_settings import training
from tiny_models import causal_lm, save_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.models.sizes.flops import EXPERTS as EXPERT_NAMES
from fastkl.trainer.models.sizes.flops import (
    VISITED,
    Cost,
    _active_share,
    _numbers,
    cost_of,
    sampling_flops,
    scoring_flops,
    training_flops,
)
from fastkl.trainer.runs.report.data import FLOPS, run_data

LENGTH = 24
WHOLE = make_sample([], list(range(LENGTH)), 0)  # every token counts
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "mixtral", "gpt2")


MIXTURES = (
    *("afmoe", "aria_text", "deepseek_v3", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe"),
    *("jamba", "jetmoe", "llama4_text", "longcat_flash", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next"),
)
EXPERTS = {"num_hidden_layers": 2, "num_experts": 4}


def model_of(kind: str, layers: int = 2) -> PreTrainedModel:
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=64, n_head=4, n_layer=layers, attn_implementation="eager")
        )
    settings: dict[str, Any] = {"num_hidden_layers": layers} if kind != "gemma3_text" else {}
    model = causal_lm(kind, "eager", **settings)
    if kind == "mixtral":
        model.set_experts_implementation("eager")  # torch does not count grouped products
    return model


def counted(model: PreTrainedModel, backward: bool = False) -> tuple[int, int]:
    """FLOPs in products with weights, and in products of activations, by torch's count."""
    ids = torch.arange(LENGTH)[None] % 60
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.logsumexp(-1).sum().backward()
    return split(counter)


def split(counter: FlopCounterMode) -> tuple[int, int]:
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = by_op.pop("aten.bmm", 0)
    return sum(by_op.values()), attention


def attention(cost: Cost) -> float:
    """Of a forward pass that computes the masked pairs too, as eager attention does."""
    return cost.pair * len(cost.windows) * LENGTH**2


def test_layers_with_heads_of_different_width() -> None:
    """Gemma 4's config has no one width: pairs cost what they do on average."""
    model = make_model("gemma4_text")
    widths = [layer.head_dim for layer in model.config.per_layer_config]
    assert widths[0] != widths[1]
    assert cost_of(model).pair == 4 * 4 * sum(widths) / 2


@pytest.mark.parametrize("kind", COMPOSITES)
def test_what_text_does_not_reach_costs_nothing(kind: str) -> None:
    model = composite(kind)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(LENGTH)[None] % 60, use_cache=False)
    cost = cost_of(model)
    found = counter.get_flop_counts()["Global"]
    products = found[torch.ops.aten.mm] + found.get(torch.ops.aten.addmm, 0)
    assert (cost.blocks + cost.head) * LENGTH == pytest.approx(products, rel=0.01)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_forward_pass_costs_what_torch_counts(kind: str) -> None:
    model = model_of(kind).eval()
    cost = cost_of(model)
    weights, pairs = counted(model)
    assert weights == (cost.blocks + cost.head) * LENGTH
    assert pairs == pytest.approx(attention(cost), rel=0.02)  # rotary embeddings are a small product


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_training_all_weights_costs_what_torch_counts(kind: str) -> None:
    model = model_of(kind).train()
    cost = cost_of(model)
    weights, pairs = counted(model, backward=True)
    assert weights == 3 * (cost.blocks + cost.head) * LENGTH
    assert pairs == pytest.approx(3 * attention(cost), rel=0.02)
    seen = cost.pair * sum(pairs_seen(window) for window in cost.windows)
    assert training_flops(cost, [WHOLE]) == pytest.approx(weights + 3 * seen)


def test_checkpointing_computes_the_blocks_twice() -> None:
    model = model_of("llama", 4).train()
    plain = cost_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cost = cost_of(model)
    weights, _ = counted(model, backward=True)
    # torch stops before a block's last product, whose result nothing needs: a sixth of these blocks.
    assert weights == pytest.approx((4 * cost.blocks + 3 * cost.head) * LENGTH, rel=0.06)
    again = training_flops(cost, [WHOLE]) - training_flops(plain, [WHOLE])
    assert again == scoring_flops(cost, [WHOLE]) - cost.head * LENGTH


def pairs_seen(window: int | None) -> int:
    return sum(min(query + 1, window or LENGTH) for query in range(LENGTH))


def test_lora_forms_no_gradient_of_frozen_weights() -> None:
    layers = 8
    model = get_peft_model(
        model_of("llama", layers), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    cost = cost_of(model.train())
    weights, _ = counted(model, backward=True)
    formula = (2 * cost.blocks + cost.trained_blocks + 2 * cost.head) * LENGTH
    assert 0 < cost.trained_blocks < 0.5 * cost.blocks
    assert cost.trained_head == 0
    # The first projections read the embeddings, which need no gradient here; the formula counts one.
    assert 0 <= formula - weights < 0.5 * cost.blocks * LENGTH / layers


def test_sampling_costs_what_torch_counts_token_by_token() -> None:
    model = model_of("llama").eval()
    prompt, completion = list(range(1, 10)), list(range(10, 22))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        for token in completion[:-1]:
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    weights, pairs = split(counter)
    cost, sample = cost_of(model), make_sample(prompt, completion, 0)
    assert weights == cost.blocks * (len(sample.ids) - 1) + cost.head * len(completion)
    masked = cost.pair * len(cost.windows) * len(prompt) * (len(prompt) - 1) / 2  # of the prefill
    assert sampling_flops(cost, [sample]) == pytest.approx(weights + pairs - masked, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        (EXPERTS | {"num_experts_per_tok": 2}, 0.5),
        (EXPERTS | {"top_k_experts": 2}, 0.5),  # Gemma 4
        (EXPERTS | {"moe_topk": [1, 2]}, 0.375),  # Hunyuan: one for each layer
        ({"num_hidden_layers": 2, "moe_num_experts": [4, 4], "moe_k": 1}, 0.25),  # Ernie
        ({"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_token": 1}, 0.25),
        (EXPERTS | {"top_k_experts": None}, 1.0),
        (EXPERTS | {"visits": 2}, 1.0),  # no known name: all are counted
    ],
)
def test_a_token_visits_some_experts(settings: dict[str, Any], share: float) -> None:
    config: Any = SimpleNamespace(**settings)
    found = _active_share((4, 8, 8), _numbers(config, EXPERT_NAMES), _numbers(config, VISITED))
    assert found == share


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_mixture_of_transformers_is_known(kind: str) -> None:
    config = CONFIG_MAPPING[kind]().get_text_config()
    experts, visited = _numbers(config, EXPERT_NAMES), _numbers(config, VISITED)
    assert 0 < _active_share((int(experts[0]), 8, 8), experts, visited) < 1


def test_what_does_not_count_has_no_head() -> None:
    cost = cost_of(model_of("llama"))
    short, long = (make_sample(list(range(20 - n)), list(range(n)), 0) for n in (1, 5))
    assert scoring_flops(cost, [long]) - scoring_flops(cost, [short]) == 4 * cost.head
    assert training_flops(cost, [long]) - training_flops(cost, [short]) == 12 * cost.head


def test_a_sliding_window_bounds_the_pairs() -> None:
    cost = cost_of(model_of("gemma3_text"))
    assert cost.windows == (8, None)
    longer = [make_sample([], [0] * length, 0) for length in (100, 101)]
    added = scoring_flops(cost, longer[1:]) - scoring_flops(cost, longer[:1])
    assert added == cost.blocks + cost.head + cost.pair * (8 + 101)


def test_a_run_counts_each_step(tmp_path: Path, folder: Path) -> None:
    teacher, runs = save_model(tmp_path / "teacher", layers=2), {}
    for old in ("sampler", "recompute"):
        done = run(tmp_path / old, folder, loss__old_logprobs=old, optim__steps=2, teacher__path=teacher)
        runs[old] = done.metrics
        assert run_data(done.folder, "run", 10_000)["x"]["flops"][-1] == sum(
            row[name] for row in runs[old] for name in FLOPS
        )
    plain, recompute = runs["sampler"][0], runs["recompute"][0]  # the same samples
    assert plain["flops/sampling"] == recompute["flops/sampling"]
    assert plain["flops/student"] < recompute["flops/student"] < 1.5 * plain["flops/student"]
    assert plain["flops/student"] > 2.9 * plain["flops/sampling"]
    assert plain["flops/teacher"] > plain["flops/sampling"]  # one more layer


def test_a_supervised_run_counts_the_student_alone(tmp_path: Path, folder: Path) -> None:
    row = Run.of(tuned(training(tmp_path / "run", folder, optim__steps=2))).metrics[0]
    assert row["flops/student"] > 0
    assert not {"flops/sampling", "flops/teacher"} & row.keys()
