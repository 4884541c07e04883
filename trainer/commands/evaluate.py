"""`fastkl eval`: a model's answers to prompts, graded."""

from __future__ import annotations

import json

from accelerate import PartialState

from fastkl.trainer.config.offline import EvaluateConfig
from fastkl.trainer.models import checks
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.loading import context_length, load_model, load_tokenizer
from fastkl.trainer.rollouts.evaluation import evaluate, load_eval_prompts
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.single_turn import SingleTurn
from fastkl.trainer.runs.files import new_file, write_jsonl


def evaluate_model(config: EvaluateConfig) -> dict[str, float]:
    """Prints `eval/*` as one JSON line; writes the graded answers if asked to."""
    output = None if config.output is None else new_file(config.output)
    tokenizer = load_tokenizer(config.model)
    prompts = load_eval_prompts(config.eval, tokenizer)
    model = load_model(config.model).to(PartialState().device)
    checks.check_vocabulary(tokenizer, {"model": model})
    checks.check_eval_room(prompts, config.eval, "model", model)
    sampler = local_sampler(model, eos_token_ids=end_of_sequence(model, tokenizer))
    responder = SingleTurn(sampler, context_length(model))
    metrics, answers = evaluate(responder, tokenizer, prompts, config.eval, config.seed)
    if output is not None:
        rows = ({**vars(answer.prompt.row), "completion": answer.text, "score": answer.score} for answer in answers)
        write_jsonl(output, rows)
    print(json.dumps(metrics))
    return metrics
