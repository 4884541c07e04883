"""`push_to_hub`: asked about before the run, uploaded after it, and only where it was asked for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from run_cases import run
from run_settings import MINIMAL, config

from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.runs.report.hub import check_repository, upload

REAL = huggingface_hub.HfApi


class Missing(RepositoryNotFoundError):
    """The Hub's answer, without the answer."""

    def __init__(self) -> None:
        OSError.__init__(self, "Repository Not Found")


class Hub:
    """In place of the Hub's client: what it was asked, each as the real client could be."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, Exception] = {}

    def __call__(self) -> Hub:
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> None:
            given = inspect.signature(getattr(REAL, name)).bind(self, *args, **options).arguments
            given.pop("self")
            if "folder_path" in given:
                assert all((given["folder_path"] / file).is_file() for file in given["allow_patterns"])
            self.calls.append((name, dict(given)))
            if name in self.fails:
                raise self.fails[name]

        return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    return stub


def settings(**others: object) -> Any:
    return config("distill", {**MINIMAL["distill"], "push_to_hub": "me/mine", **others})


@pytest.mark.slow
def test_a_run_uploads_what_it_saved(tmp_path: Path, padded: Path, hub: Hub) -> None:
    done = run(tmp_path / "first", padded, optim__steps=1)
    assert hub.calls == []
    (done.folder / "student/notes.txt").write_text("mine")
    run(tmp_path / "first", padded, optim__steps=1, push_to_hub="me/mine")  # of a run that is finished
    (asked, _), (uploaded, given) = hub.calls
    assert (asked, uploaded) == ("auth_check", "upload_folder")
    assert (given["repo_id"], given["folder_path"]) == ("me/mine", done.folder / "student")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {*given["allow_patterns"]}
    assert "notes.txt" not in given["allow_patterns"]


def test_the_files_that_are_named_are_uploaded(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "README.md").touch()
    assert upload(config("sft", MINIMAL["sft"]), tmp_path, ["README.md"]) is None
    assert hub.calls == []
    assert upload(settings(), tmp_path, ["README.md"]) == "student uploaded to me/mine on the Hub"
    ((_, given),) = hub.calls
    assert (given["repo_id"], given["folder_path"], given["allow_patterns"]) == ("me/mine", tmp_path, ["README.md"])
    hub.fails["upload_folder"] = OSError("no connection")
    with pytest.raises(
        RunError, match=r"but was not uploaded to me/mine \(no connection\)\. The same command tries again"
    ):
        upload(settings(), tmp_path, ["README.md"])


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_is_not_there_is_made(hub: Hub, private: bool) -> None:
    hub.fails["auth_check"] = Missing()
    check_repository(settings(push_private=private))
    assert hub.calls[1] == ("create_repo", {"repo_id": "me/mine", "private": private})


@pytest.mark.parametrize("call", ["auth_check", "create_repo"])
@pytest.mark.parametrize("error", [LocalTokenNotFoundError("Token is required"), RuntimeError("403 Forbidden")])
def test_what_cannot_be_written_is_refused_before_anything_is_read(hub: Hub, call: str, error: Exception) -> None:
    hub.fails = {"auth_check": Missing(), call: error}
    with pytest.raises(
        ConfigError, match=r"push_to_hub is 'me/mine', which cannot be written \((Token is|403).*HF_TOKEN"
    ):
        run(Path("/nonexistent/run"), Path("/nonexistent"), push_to_hub="me/mine")


def test_offline() -> None:
    with pytest.raises(ConfigError, match=r"me/mine.*HF_HUB_OFFLINE"):
        check_repository(settings())


@pytest.mark.parametrize("name", ["mine", "/mine", "me/my/own", "https://huggingface.co/me/mine", "me/a b", ""])
def test_it_is_a_name_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match=r"push_to_hub is .*; name a repository of the Hub, USER/NAME"):
        settings(push_to_hub=name)
