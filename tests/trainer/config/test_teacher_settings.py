"""Settings of teachers that are refused, and in which words: servers, and the student as its own teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cases import check_refused, refusal, refusals
from run_settings import MINIMAL, SERVED, URL

OWN: dict[str, object] = {"teacher.tokenizer": "own"}
BASE: dict[str, object] = {"teacher.self": "base", "teacher.path": ""}
# settings, what the message must hold: the setting with its value, and the way out
REFUSED: list[tuple[dict[str, object], list[str]]] = [
    ({"teacher.path": ""}, ["teacher.path is empty", "model folder or a Hub id"]),
    (SERVED | {"teacher.path": "t"}, ["teacher.path is 't'", URL, "exactly one"]),
    ({"teacher.tokenizer": "t"}, ["teacher.tokenizer is 't'", "teacher.path is 't'", "unset it"]),
    ({"teacher.path": ""}, ["teacher.server.url", "or a server's url"]),
    (
        SERVED | {"sampling.server.url": f"{URL}/", "sampling.server.model": "s"},
        [
            f"teacher.server.url and sampling.server.url are both {URL}",
            "Serve the teacher elsewhere",
            "student.lora.rank",
        ],
    ),
    (SERVED | {"teacher.server.url": "127.0.0.1:8000"}, ["server.url is '127.0.0.1:8000'", "http://"]),
    (SERVED | {"teacher.server.url": "http://me:pw@h/v1"}, ["server.url holds a user", "server.api_key_env"]),
    (SERVED | {"teacher.server.url": "http://h:99999/v1"}, ["server.url is 'http://h:99999/v1'", "Port out of range"]),
    (
        SERVED | {"teacher.server.url": "http://[::1/v1"},
        ["server.url is 'http://[::1/v1'", "Invalid IPv6", "give one like"],
    ),
    (SERVED | {"teacher.server.url": "http://a b/v1"}, ["server.url is 'http://a b/v1'", "no address has"]),
    (SERVED | {"teacher.server.url": "http://h/v1#x"}, ["server.url is 'http://h/v1#x'", "have no #"]),
    (SERVED | {"teacher.server.model": ""}, ["server.model is empty", URL]),
    (SERVED | {"teacher.server.url": ""}, ["server.model is 'm'", "server.url is empty"]),
    (SERVED | {"teacher.server.concurrency": 0}, ["server.concurrency is 0", "at least 1"]),
    (SERVED | {"teacher.server.sequences_per_request": 0}, ["server.sequences_per_request is 0", "at least 1"]),
    (SERVED | {"teacher.server.timeout": 1e12}, ["server.timeout is 1e+12", "at most 1e+06 seconds"]),
    (SERVED | {"teacher.server.recheck_every": -1}, ["server.recheck_every is -1", "at least 0"]),
    (SERVED | {"teacher.server.timeout": 0}, ["server.timeout is 0", "> 0"]),
    (SERVED | {"teacher.server.retries": -1}, ["server.retries is -1", "at least 0"]),
    (SERVED | {"teacher.server.api_key_env": "sk-secret"}, ["server.api_key_env is not the name"]),
    (SERVED | {"teacher.dtype": "bfloat16"}, ["teacher.dtype is 'bfloat16'", URL, "unset it"]),
    (SERVED | {"teacher.device": "cpu"}, ["teacher.device is 'cpu'", URL, "unset it"]),
    (SERVED | {"teacher.quantization": "8bit"}, ["teacher.quantization is '8bit'", URL, "unset it"]),
    (
        {"teacher.self": "base", "student.lora.rank": 2},
        ["teacher.self is base", "teacher.path is 't'", "unset one"],
    ),
    (BASE, ["teacher.self is base", "student.lora.rank is 0", "teacher.path"]),
    (BASE | {"teacher.dtype": "bfloat16"}, ["teacher.self is base", "teacher.dtype is 'bfloat16'", "unset one"]),
    (BASE | {"teacher.server.url": URL, "teacher.server.model": "m"}, ["teacher.self is base", "teacher.server is"]),
    (BASE | {"teacher.ema_rate": 0.1}, ["teacher.ema_rate is 0.1", "teacher.self is base", "belongs to ema"]),
    ({"teacher.sync_every": 5}, ["teacher.sync_every is 5", "teacher.self is null", "belongs to synced"]),
    (BASE | {"teacher.self": "ema"}, ["teacher.self is ema", "teacher.ema_rate is null"]),
    (BASE | {"teacher.self": "ema", "teacher.ema_rate": 1}, ["teacher.ema_rate is 1", "below 1", "live"]),
    (BASE | {"teacher.self": "ema", "teacher.ema_rate": 0}, ["teacher.ema_rate is 0", "above 0", "base"]),
    (BASE | {"teacher.self": "ema", "teacher.ema_rate": "nan"}, ["teacher.ema_rate is nan", "above 0"]),
    (BASE | {"teacher.self": "synced"}, ["teacher.self is synced", "teacher.sync_every is null"]),
    (BASE | {"teacher.self": "synced", "teacher.sync_every": 1}, ["teacher.sync_every is 1", "at least 2", "live"]),
    (
        BASE | {"teacher.self": "ema", "teacher.ema_rate": 0.1, "teacher.device": "cpu", "student.lora.rank": 2},
        ["teacher.device is 'cpu'", "teacher.self is ema", "student.lora.rank is 2", "unset it"],
    ),
    (BASE | {"teacher.self": "live"}, ["teacher.self is live", "its KL is 0", "reward.grader"]),
    (BASE | {"teacher.self": "live", "loss.objective": "reverse_kl"}, ["teacher.self is live", "its KL is 0"]),
    (BASE | OWN, ["teacher.self is base", "teacher.tokenizer is 'own'", "unset one"]),
    ({"teacher.tokenizer": "own:t"}, ["teacher.tokenizer is 'own:t'", "teacher.path is 't'", "set it to own"]),
    (SERVED | OWN, ["teacher.tokenizer is 'own'", URL, "own:FOLDER"]),
    (SERVED | {"teacher.tokenizer": "own:"}, ["teacher.tokenizer is 'own:'", URL, "own:FOLDER"]),
    ({"loss.max_segment": 9}, ["loss.max_segment is 9", "no teacher.tokenizer is own", "unset it"]),
    (OWN | {"loss.max_segment": 0}, ["loss.max_segment is 0", "at least 1"]),
    (
        OWN | {"loss.objective": "density_power"},
        ["loss.objective is density_power", "teacher.tokenizer is own", "another divergence"],
    ),
    (
        OWN | {"loss.objective": "top_k", "loss.top_k_of": "both"},
        ["loss.top_k_of is both", "teacher.tokenizer is own", "to teacher"],
    ),
    *(
        (
            OWN | {"loss.objective": "top_k", "loss.top_k_tail": tail},
            [f"loss.top_k_tail is {tail}", "teacher.tokenizer is own", "to bucket"],
        )
        for tail in ("renormalise", "drop", "sampled")
    ),
    (OWN | {"loss.baseline": "kl"}, ["loss.baseline is kl", "teacher.tokenizer is own", "to mean"]),
    (OWN | {"loss.forward_kl_above": 1}, ["loss.forward_kl_above is 1", "teacher.tokenizer is own", "unset it"]),
    (OWN | {"loss.control": "shuffled"}, ["loss.control is shuffled", "teacher.tokenizer is own", "no_teacher"]),
    (
        OWN | {"loss.weights": ["skip_first:1", "tip:0.5"]},
        ["loss.weights has tip:0.5", "teacher.tokenizer is own", "unset one"],
    ),
    (
        {"teacher.context.template_kwargs": "{a: 1}"},
        ["teacher.context.template_kwargs is {'a': 1}", "teacher.tokenizer is null", "unset it"],
    ),
    (
        BASE | {"teacher.self": "live", "reward.grader": "boxed", "reward.baseline": "none", "loss.redistribute": 0.5},
        ["teacher.self is live", "loss.redistribute (0.5)", "unset one"],
    ),
]


@pytest.mark.parametrize(("command", "settings", "parts"), refusals("distill", REFUSED))
def test_refused_settings(
    command: str, settings: dict[str, object], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(capsys, empty_folder, command, settings, *parts)


def test_a_key_in_place_of_its_variables_name_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    settings = MINIMAL["distill"] | SERVED | {"teacher.server.api_key_env": "sk-secret"}
    assert "sk-secret" not in refusal(capsys, "distill", settings)
