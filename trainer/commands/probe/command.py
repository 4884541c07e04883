"""`fastkl probe`: is there anything to learn from this teacher, on these prompts? Nothing is trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from fastkl.trainer.commands.probe.compare import figures
from fastkl.trainer.commands.probe.cost import cost_of_run
from fastkl.trainer.commands.probe.opened import opened
from fastkl.trainer.commands.probe.table import lines
from fastkl.trainer.commands.probe.verdict import judged
from fastkl.trainer.commands.probe.written import write
from fastkl.trainer.config.offline import ProbeConfig
from fastkl.trainer.errors import ConfigError, RunError, brief
from fastkl.trainer.runs.files import write_text


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Prints what student and teacher say on some prompts, and a verdict; returns it as `--json` prints it.

    Raises:
        ConfigError: Where the run would be refused, and for what a probe cannot do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("fastkl probe runs in one process; start it without a launcher")
    output = None if config.output is None else _new_file(config.output)
    with opened(config) as found:
        texts = write(found)
        said = figures(found, texts) | {"run": cost_of_run(config, found, texts)}
    said |= judged(said, config)
    text = json.dumps(said, ensure_ascii=False, indent=1)
    print(text if config.json else "\n".join(lines(said)), flush=True)
    if output is not None:
        _write(output, text + "\n")
    return said


def _new_file(name: str) -> Path:
    """A file that is not there yet and can be."""
    path = Path(name).expanduser()
    if path.is_dir() or not _takes_files(path.absolute().parent):
        raise ConfigError(f"output is {name}, where no file can be written; name a file in a folder that is there")
    if path.exists():
        raise ConfigError(f"output {name} exists already; move it away or choose another name")
    return path


def _takes_files(folder: Path) -> bool:
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({brief(error)}); what the probe found is printed above") from error
