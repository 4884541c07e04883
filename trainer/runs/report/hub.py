"""The student on the Hub: whether its repository can be written, before the run; the upload, after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError

from fastkl.trainer.config.training import RunConfig
from fastkl.trainer.errors import ConfigError, RunError, brief
from fastkl.trainer.notes import note


def check_repository(config: RunConfig) -> None:
    """Makes the repository `push_to_hub` where there is none, and asks whether it may be written.

    Raises:
        ConfigError: If it may not.
    """
    repository = config.push_to_hub
    if repository is None:
        return
    api = huggingface_hub.HfApi()
    try:
        try:
            api.auth_check(repository, write=True)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=config.push_private)
            note(f"made the {'private' if config.push_private else 'public'} repository {repository} on the Hub")
    except Exception as error:  # the client's transport has errors of several packages
        raise ConfigError(
            f"push_to_hub is {repository!r}, which cannot be written ({brief(error)}). Name a repository of yours, and "
            f"give a token that may write, by `hf auth login` or HF_TOKEN; or unset push_to_hub"
        ) from error


def upload(config: RunConfig, folder: Path, files: Iterable[str]) -> str | None:
    """Uploads these files of the student's folder, and no others; returns what is to be said.

    Raises:
        RunError: If that fails.
    """
    repository = config.push_to_hub
    if repository is None:
        return None
    message = f"Student of a run of {config.optim.steps} steps"
    try:
        huggingface_hub.HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, allow_patterns=sorted(files)
        )
    except Exception as error:  # as above
        raise RunError(
            f"the student is in {folder}, but was not uploaded to {repository} ({brief(error)}). The same command tries "
            f"again"
        ) from error
    return f"student uploaded to {repository} on the Hub"
