"""Rollouts with a scripted sampler: what is sampled, what the environment adds, what is kept, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from chat_templates import family_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY
from run_cases import fields
from tiny_models import tokenizer

from fastkl.trainer.config.reward import EnvironmentConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.chat import ChatTemplate, end_of_turn
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.samples import Completion, Sample, make_sample
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.calculator import calculate
from fastkl.trainer.rollouts.environments import Calculator, Message, Reply, make_environment
from fastkl.trainer.rollouts.lengths import filter_by_length, length_limit
from fastkl.trainer.rollouts.multi_turn import MultiTurn, stop_ids
from fastkl.trainer.rollouts.rollout import Rollouts, on_policy_count
from fastkl.trainer.rollouts.single_turn import SingleTurn, Trajectory, sample_within
from fastkl.trainer.rollouts.turn_markers import turn_markers

WORDS = tokenizer("0123456789+-*/= abcdefghijklmnopqrstuvwxyz<>")
END = WORDS.eos_token_id


def ids(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


def encoded(text: str = "<u>q<a>", index: int = 0) -> EncodedPrompt:
    return EncodedPrompt(Prompt("rows:1", "q", answer="84"), ids(text), index)


class Scripted:
    """Writes what a script says after each text; token i of a call has log-prob −i − 1, and every call is recorded."""

    shared = True

    def __init__(self, script: Callable[[str], str]) -> None:
        self.script, self.calls = script, list[dict[str, Any]]()

    def sample(self, prompts: list[list[int]], **options: Any) -> list[Completion]:
        self.calls.append({"prompts": prompts, **options})
        return [self._one(self.script(WORDS.decode(prompt)), options["max_new_tokens"]) for prompt in prompts]

    def _one(self, text: str, limit: int) -> Completion:
        whole = ids(text)
        tokens = whole[:limit]
        return Completion(tokens, [-1.0 - i for i in range(len(tokens))], tokens != whole or tokens[-1] != END)


def multi_turn(script: Callable[[str], str], environment: Any = None, **settings: Any) -> tuple[MultiTurn, Scripted]:
    sampler = Scripted(script)
    config = EnvironmentConfig(name="calculator", **settings)
    return MultiTurn(sampler, WORDS, environment or Calculator(), config, [END], 200), sampler


def write(responder: Any, count: int = 1, limit: int = 60, **options: Any) -> list[Trajectory]:
    arguments = {"temperature": 1.0, "seed": 7, **options}
    return responder.respond([encoded()] * count, max_new_tokens=[limit] * count, **arguments)


def calculating(text: str) -> str:
    return "so 84<eos>" if " = 84" in text else "<calc>12*7</calc>xyz<eos>"


def test_the_environments_tokens_are_context() -> None:
    responder, sampler = multi_turn(calculating)
    (trajectory,) = write(responder)
    assert WORDS.decode(trajectory.token_ids) == "<calc>12*7</calc> = 84so 84<eos>"
    asked, told, rest = len(ids("<calc>12*7</calc>")), len(ids(" = 84")), len(ids("so 84<eos>"))
    assert trajectory.counted == [True] * asked + [False] * told + [True] * rest
    # What was cut after the tag takes its log-probs with it; the others stay at their tokens.
    assert trajectory.logprobs == [*(-1.0 - i for i in range(asked)), *[0.0] * told, *(-1.0 - i for i in range(rest))]
    assert not trajectory.truncated
    assert trajectory.answer_ids == trajectory.token_ids
    # The student goes on after exactly these ids, with another seed.
    assert sampler.calls[1]["prompts"] == [encoded().ids + trajectory.token_ids[: asked + told]]
    assert len({call["seed"] for call in sampler.calls}) == 2


def test_many_samples_advance_together() -> None:
    responder, sampler = multi_turn(lambda text: calculating(text) if len(sampler.calls) < 3 else "no<eos>")
    write(responder, count=5)
    assert [len(call["prompts"]) for call in sampler.calls] == [5, 5]


@pytest.mark.parametrize(("max_turns", "texts"), [(1, 1), (2, 2), (3, 3)])
def test_max_turns(max_turns: int, texts: int) -> None:
    responder, sampler = multi_turn(lambda text: "<calc>1+1</calc>" + "x" * 100, max_turns=max_turns)
    (trajectory,) = write(responder, limit=100)
    assert len(sampler.calls) == texts
    assert WORDS.decode(trajectory.token_ids) == " = 2".join(["<calc>1+1</calc>"] * texts)
    assert trajectory.truncated  # the student had not ended


@pytest.mark.parametrize("limit", range(1, 40))
def test_no_conversation_is_longer_than_its_limit(limit: int) -> None:
    responder, _ = multi_turn(lambda text: "<calc>1+1</calc>" + "x" * 100)
    (trajectory,) = write(responder, limit=limit)
    assert len(trajectory.token_ids) <= limit
    assert len(trajectory.token_ids) == len(trajectory.counted) == len(trajectory.logprobs)
    assert trajectory.counted[-1]  # no reply that nothing follows
    assert trajectory.truncated


def test_a_role_has_turns_of_its_own() -> None:
    turns: list[list[Message]] = []

    class Echo:
        stops: Sequence[str] = ()
        rewards = True

        def reply(self, conversation: Sequence[Message], row: Prompt) -> Reply:
            turns.append(list(conversation))
            return Reply("and", 0.5) if len(conversation) < 4 else Reply(reward=2.0)

    script = {"<u>q<a>": "one<eos>", "<u>q<a>one<eos><u>and<a>": "two<eos>"}
    responder, _ = multi_turn(script.__getitem__, Echo(), role="user")
    (trajectory,) = write(responder)
    assert WORDS.decode(trajectory.token_ids) == "one<eos><u>and<a>two<eos>"
    assert trajectory.counted == [True] * 4 + [False] * 5 + [True] * 4
    assert trajectory.reward == 2.5
    assert WORDS.decode(trajectory.answer_ids) == "two<eos>"
    assert turns[-1] == [("user", "q"), ("assistant", "one"), ("user", "and"), ("assistant", "two")]


def test_a_reply_inside_a_message_that_has_ended_is_an_error() -> None:
    class Late:
        stops: Sequence[str] = ()
        rewards = False

        def reply(self, conversation: Sequence[Message], row: Prompt) -> Reply:
            return Reply("more")

    responder, _ = multi_turn(lambda text: "one<eos>", Late())
    with pytest.raises(ValueError, match=r"inside a message that the student had ended.*environment\.role"):
        write(responder)


def with_template(template: str) -> Any:
    words = tokenizer()
    words.chat_template = template
    return words


def test_turn_markers() -> None:
    turns = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}.\n{% endfor %}"
    template = with_template(turns + "{% if add_generation_prompt %}[a]{% endif %}")
    assert turn_markers(template, "tool") == (".\n[t]", ".\n[a]")
    # An end of turn that was sampled is not written a second time.
    assert turn_markers(WORDS, "user") == ("<u>", "<a>")


@pytest.mark.parametrize("name", ["smollm", "gemma", "llama", "mistral", "padded"])
def test_an_end_of_turn_that_was_sampled_is_not_written_again(name: str) -> None:
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n<|im_end|>\n{% endfor %}"
    padded = turns + "{{ '<|im_start|>assistant\n' }}"
    words = family_tokenizer("smollm", template=padded) if name == "padded" else family_tokenizer(name)
    markers, end = turn_markers(words, "user"), end_of_turn(words)
    assert end is not None
    written = markers.ids("hi", words, end, {end})
    assert words.decode(written) == (markers.before + "hi" + markers.after).partition(words.decode(end))[2]
    assert words.decode(markers.ids("hi", words, 0, {end})) == f"{markers.before}hi{markers.after}"


def test_turn_markers_are_those_of_the_prompts_template() -> None:
    """Which has the variables of the data set."""

    class Once:
        stops, rewards = (), False

        def reply(self, conversation: Sequence[Message], row: Prompt) -> Reply:
            return Reply("?" if len(conversation) == 2 else None)

    words = with_template("{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}")
    sampler, config = Scripted(lambda text: "1<eos>"), EnvironmentConfig(name="calculator", role="user")
    chats = [ChatTemplate(words, {"mark": mark}) for mark in "xy"]
    responder = MultiTurn(sampler, words, Once(), config, [END], 200, chats)
    prompts = [EncodedPrompt(Prompt("p", "2"), ids("2"), chat=chat) for chat in chats]
    written = responder.respond(prompts, max_new_tokens=[40, 40], temperature=1.0, seed=0)
    assert [words.decode(t.token_ids) for t in written] == ["1<eos>x?x1<eos>", "1<eos>y?y1<eos>"]
    with pytest.raises(ConfigError, match="puts nothing between two turns"):
        MultiTurn(sampler, words, Once(), config, [END], 200)


REFUSED = {
    "rewrites": (
        "{% for m in messages %}<{{ m.role[0] }}>{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
        "does not leave the student's turn|rewrites earlier turns",
    ),
    "upper": (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content | upper }}{% endfor %}<a>",
        "does not leave the student's turn",
    ),
    "last-only": (
        "{% for m in messages %}{% if loop.index > messages | length - 3 %}<{{ m.role[0] }}>{{ m.content }}{% endif %}"
        "{% endfor %}<a>",
        "rewrites earlier turns",
    ),
    "no-such-role": ("{{ raise_exception('only user and assistant') }}", "refuses the conversation"),
    "unmarked": ("{% for m in messages %}{{ m.content }}{% endfor %}", "puts nothing between"),
}


@pytest.mark.parametrize(("template", "message"), REFUSED.values(), ids=REFUSED)
def test_templates_that_cannot_carry_on_are_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"environment\.role is 'tool'.*({message})"):
        turn_markers(with_template(template), "tool")


def test_stops_of_one_token_end_the_sampling() -> None:
    words = tokenizer()
    assert stop_ids(Calculator(), words) == []
    words.add_tokens(["</calc>"])
    assert stop_ids(Calculator(), words) == words.convert_tokens_to_ids(["</calc>"])


CALCULATED = {
    **{"12*7": "84", "1-2*3": "-5", "-(2+3)": "-5", "1/3": "0.333333", "0.1+0.2": "0.3", "7/7": "1"},
    "1+" * 49 + "1": "50",
    **dict.fromkeys(["1/0", "", "x", "__import__('os')", "9**9**9", "1<2", "True", "(" * 5000], "error"),
}


@pytest.mark.parametrize(("expression", "value"), CALCULATED.items())
def test_calculate(expression: str, value: str) -> None:
    assert calculate(expression) == value


@PROPERTY
@given(text=st.text(max_size=120))
def test_any_text_is_calculated_or_an_error(text: str) -> None:
    assert isinstance(calculate(text), str)


def test_unknown_and_untrusted_environments() -> None:
    with pytest.raises(ConfigError, match=r"environment\.name is 'chess'; known are calculator"):
        make_environment(EnvironmentConfig(name="chess"))
    with pytest.raises(ConfigError, match=r"environment\.trust to true"):
        make_environment(EnvironmentConfig(name="class:my.Env"))


@PROPERTY
@given(
    pairs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6), spare=st.integers(0, 20)
)
def test_sample_within_keeps_each_to_its_own_budget(pairs: list[tuple[int, int]], spare: int) -> None:
    context = max(length + budget for length, budget in pairs) + spare
    sampler = Scripted(lambda text: "abcdefghijklmnopqrstuvwxyz<eos>"[len(text.lstrip("q")) :])
    prompts = [ids("q" * length) for length, _ in pairs]
    done = sample_within(sampler, prompts, [b for _, b in pairs], context=context, temperature=1.0, seed=3)
    for completion, (_, budget) in zip(done, pairs, strict=True):
        assert WORDS.decode(completion.token_ids) == "abcdefghijklmnopqrstuvwxyz<eos>"[:budget][
            : 26 + 5 * (budget > 26)
        ] or (budget > 26 and completion.token_ids[-1] == END)
        assert len(completion.logprobs) == len(completion.token_ids) == min(budget, 27)
        assert completion.truncated == (budget < 27)
    for call in sampler.calls:
        assert max(map(len, call["prompts"])) + call["max_new_tokens"] <= context
    assert sampler.calls[0]["seed"] == 3


@given(prompts=st.integers(1, 20), fraction=st.floats(0, 1), steps=st.integers(1, 30))
def test_on_policy_counts_add_up(prompts: int, fraction: float, steps: int) -> None:
    counts = [on_policy_count(prompts, fraction, step) for step in range(steps)]
    assert all(0 <= count <= prompts for count in counts)
    assert abs(sum(counts) - prompts * fraction * steps) <= 1
    if fraction in (0, 1):
        assert counts == [int(prompts * fraction)] * steps


def test_the_limit_grows_to_its_end() -> None:
    config = SamplingConfig(max_new_tokens=20, initial_new_tokens=10, growth_steps=4)
    assert [length_limit(config, step) for step in range(6)] == [10, 12, 15, 17, 20, 20]
    assert length_limit(SamplingConfig(max_new_tokens=20), 0) == 20


def test_filters() -> None:
    samples = [make_sample([1], [2] * n, 0, truncated=n == 5) for n in range(1, 6)]
    samples.append(dataclasses.replace(make_sample([1], [2] * 9, 0), given=True))

    def lengths(**settings: Any) -> list[int]:
        config = SamplingConfig(max_new_tokens=5, **settings)
        return [sample.completion_length for sample in filter_by_length(samples, config)]

    assert lengths() == [1, 2, 3, 4, 5, 9]
    assert lengths(drop_truncated=True) == [1, 2, 3, 4, 9]
    assert lengths(min_completion_tokens=2, max_completion_tokens=3) == [2, 3, 9]


TWO = [encoded("q"), encoded("qq", 1)]


def partial(script: Callable[[str], str], first: list[EncodedPrompt], judge: Any = None) -> Rollouts:
    """In two steps, of which the second has the second prompt."""
    config, steps = SamplingConfig(max_new_tokens=6, tokens_per_step=4), [first, TWO[1:]]
    return Rollouts(config, SingleTurn(Scripted(script), 100), steps.__getitem__, 0, TWO, [], judge)


def alphabet(text: str) -> str:
    return "abcdefgh"[len(text.lstrip("q")) :] + "<eos>"


def test_unfinished_samples_go_on_with_their_new_tokens_in_the_loss() -> None:
    judged: list[str] = []

    def judge(trajectory: Trajectory, prompt: EncodedPrompt) -> float:
        judged.append(WORDS.decode(trajectory.answer_ids))
        return 1.0

    rollouts = partial(alphabet, TWO[:1], judge)
    (first,) = rollouts.samples(0)
    assert (first.unfinished, first.truncated, first.reward) == (True, False, None)
    rollouts.carry_over([first])
    new, old = rollouts.samples(1)
    assert WORDS.decode(old.ids) == "qabcdef"
    assert old.loss_mask.tolist() == [False] * 5 + [True] * 2
    assert (old.unfinished, old.truncated, old.reward, old.completion_length) == (False, True, 1.0, 6)
    assert judged == ["abcdef"]
    assert new.unfinished
    rollouts.carry_over([new, old])
    assert rollouts.state_dict() == {"unfinished": [{"prompt_index": 1, "completion": ids("abcd")}]}


def test_the_state_is_all_there_is_to_resume_from() -> None:
    whole = partial(alphabet, TWO)
    whole.carry_over(whole.samples(0))
    resumed = partial(alphabet, TWO)
    resumed.load_state_dict(whole.state_dict())
    assert [*map(fields, resumed.samples(1))] == [*map(fields, whole.samples(1))]
    # A step that is taken again, because its teacher was away, is the same.
    assert [*map(fields, whole.samples(1))] == [*map(fields, whole.samples(1))]


def test_given_completions_fill_the_rest() -> None:
    sampler = Scripted(lambda text: "a<eos>")
    given: list[Sample] = [dataclasses.replace(make_sample(ids("q"), ids("xyz"), i), given=True) for i in range(4)]
    config = SamplingConfig(max_new_tokens=6, on_policy_fraction=0.5, samples_per_prompt=2)
    prompts = [encoded("q", index) for index in range(4)]
    step = [prompts[index] for index in (2, 3, 0, 1)]
    samples = Rollouts(config, SingleTurn(sampler, 100), lambda _: step, 0, prompts, given, None).samples(0)
    sampled = [(2, False), (2, False), (3, False), (3, False)]
    assert [(s.prompt_index, s.given) for s in samples] == [*sampled, (0, True), (1, True)]
    samples[-1].advantages = [1.0]
    assert len(given[1].advantages) == 0  # a step changes nothing of the next one's
