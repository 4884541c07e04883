"""Sampling by a vLLM server, on the student's current weights."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.errors import ServerError, brief
from fastkl.trainer.models import checks
from fastkl.trainer.models.loading import vocab_size
from fastkl.trainer.models.saving import save_weights
from fastkl.trainer.models.scoring import check_finite
from fastkl.trainer.models.tokenizers import SAMPLE_TEXT
from fastkl.trainer.rollouts.samplers.common import undisturbed
from fastkl.trainer.rollouts.samplers.remote import RemoteSampler, check_meaning
from fastkl.trainer.rollouts.samplers.weights_folder import COPIES, weights_folder, weights_size
from fastkl.trainer.runs import processes
from fastkl.trainer.servers.check_sampling import PROBE_TOKENS, check_sampling
from fastkl.trainer.servers.completions import CompletionsServer
from fastkl.trainer.servers.connection import Connection, Refused
from fastkl.trainer.servers.generation import GenerationServer
from fastkl.trainer.servers.recheck import distance
from fastkl.trainer.servers.transfer import TransferLoader
from fastkl.trainer.servers.weights import AdapterLoader, Loader, ModelLoader
from fastkl.trainer.student import Student

TOLERANCE = 0.1  # nats, mean over the probe: above what 16-bit arithmetic does, below what another model does
GROWTH, MARGIN = 3.0, 0.003  # later, so many times the smallest difference and some nats: a layer left out shows
MOVED = 1e-3  # nats: an update that changes the student's log-probs by so much changes those of a server, in any dtype
ATTEMPTS = 3


class SamplingServer:
    """A server that `connect_sampling` has found fit, before a student was loaded."""

    def __init__(self, config: DistillConfig, probe: list[int]) -> None:
        self.config, self.probe = config.sampling.server, probe
        self.connection = Connection(self.config, "the sampling server")
        self.generation = GenerationServer(self.connection, vocab_size(config.student))
        self.name = f"fastkl-{uuid.uuid4().hex}"  # of this process: what it loads and caches there is its own
        self.run = Path(config.run).expanduser().resolve()
        self._copies = COPIES + config.sampling.steps_ahead
        self.loader = self._loader(config.student.lora.rank)

    def _loader(self, rank: int) -> Loader:
        if rank:
            return AdapterLoader(self.connection, rank)
        if self.config.transfer is not None:
            return TransferLoader(self.connection, self.config)
        return ModelLoader(self.connection, self.config.model)

    def folder(self, size: float) -> Path:
        """Where weights of so many bytes are written."""
        if self.config.weights is not None:
            return Path(self.config.weights).expanduser().resolve()
        return weights_folder(self.config.url, self.run, size, self._copies)


def connect_sampling(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    held_out: Sequence[tuple[int, str]],
) -> SamplingServer:
    """A server that has shown what `check_sampling` asks of it, and that it can take weights.

    `longest`: the tokens of the longest prompt of the run. `held_out`: those of the longest prompts of evaluations with
    their answers, and the settings that say so.
    """
    probe = tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
    server = SamplingServer(config, probe)
    rooms = [(longest + config.sampling.max_new_tokens, "sampling", "data")]
    rooms += [(tokens, setting, f"{setting}.data") for tokens, setting in held_out]
    length, part, data = max(rooms)

    def check() -> None:
        check_sampling(
            server.generation,
            config.sampling.server.model,
            probe,
            temperature=config.sampling.temperature,
            highest=max(tokenizer.get_vocab().values()),
            longest=[PAD_ID] * length,
            remedy=checks.SHORTER.format(part, data),
        )
        server.loader.check()

    processes.on_main(check)
    return server


class Weights(NamedTuple):
    """The student's weights as they were at some time, for a server to load."""

    version: int  # of the student; below 0: of one that wrote a checkpoint
    folder: Path
    logprobs: list[float]  # what the student with these weights says of the probe

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds them: the files, which are read when that is written."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        content = {str(path.relative_to(self.folder)): _mapped(path) for path in files}
        return {"files": content, "logprobs": self.logprobs}


class ServedSampler:
    """Samples from a server, which gets the student's weights whenever they have changed.

    Of several processes the first alone samples, and pushes the weights: a server that was away may need them at any time.
    One thread at a time samples. Another one may hold weights meanwhile.
    """

    shared = False

    def __init__(self, server: SamplingServer, student: Student, eos_token_ids: Iterable[int]) -> None:
        self._server, self._student, self._eos = server, student, set(eos_token_ids)
        self._folders = 0  # that were written,
        self._folder: Path | None = None  # and where
        self._lock = threading.Lock()  # of what folders are there
        self._newest: Weights | None = None
        self._held: list[Weights] = []
        self._pinned: Weights | None = None
        self._over = threading.Event()
        self._ordered: Weights | None = None  # the last that the server was told to load,
        self._loaded: Weights | None = None  # and what it has, where that is known
        self._model = ""
        self._theirs: list[float] = []  # log-probs of the probe by the server, and by the student, at the last push
        self._ours: list[float] = []
        self._limit = TOLERANCE

    def refresh(self) -> None:
        """Pushes the weights to sample from unless the server has them; a ServerError says that it did not take them."""
        version = self._student.version if self._pinned is None else self._pinned.version
        if self._loaded is not None and self._loaded.version == version:
            return
        weights = self._pinned or self._snapshot()
        before, self._ordered = self._ordered, weights
        try:
            self._model = self._server.loader.load(weights.folder)
        finally:
            with self._lock:
                self._drop(before)
                self._drop(weights)
        self._check_loaded(weights)
        self._loaded = weights

    def hold(self, weights: Weights | None = None) -> Weights:
        """Weights, the student's of now if none are given: their folder stays until they are released as often as held."""
        with self._lock:
            self._held.append(self._snapshot() if weights is None else weights)
            return self._held[-1]

    def restored(self, state: dict[str, Any]) -> Weights:
        """Holds weights that a checkpoint has (`Weights.state`)."""
        folder = self._new_folder()
        with _written(folder):
            for name, content in state["files"].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content.numpy().tobytes())
        return self.hold(Weights(-self._folders, folder, state["logprobs"]))

    def is_current(self, weights: Weights) -> bool:
        """Whether the student has these weights."""
        return weights.version == self._student.version

    def release(self, weights: Weights) -> None:
        with self._lock:
            self._held.remove(weights)
            self._drop(weights)

    @contextmanager
    def pinned(self, weights: Weights, over: threading.Event) -> Iterator[None]:
        """While open it samples from these weights, not the student's own. Once it is `over`, `sample` raises Ended."""
        self._pinned, before, self._over = weights, self._over, over
        try:
            yield
        finally:
            self._pinned, self._over = None, before

    def sample(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        arrived: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt (see `Sampler`); a ServerError says why the server gives none.

        `arrived` is told each with its place as soon as it is there, by any thread; again where it had to be made again.
        """
        for _ in range(ATTEMPTS):
            self.refresh()
            failures = self._server.connection.failures
            try:
                completions = self._sampler().ask(prompts, max_new_tokens, temperature, seed, arrived)
            except Refused:
                if self._is_as_pushed(failures):
                    raise
            else:
                if self._is_as_pushed(failures):
                    check_meaning(self._server.generation, completions)
                    return completions
            self._loaded = None  # it has other weights by now
        raise ServerError(
            f"the sampling server at {self._server.connection.url} lost the student's weights in {ATTEMPTS} attempts to "
            f"sample. See why it starts again, or who else gives it weights (another run needs a server of its own), then "
            f"give the same command: the run goes on where it stopped"
        )

    def _is_as_pushed(self, failures: int) -> bool:
        """Whether the server answers as it did after the push; exactly so, if there were `failures` and are more by now."""
        exactly = self._server.connection.failures != failures
        try:
            again = self._ask()
        except Refused:  # it does not know the adapter any more
            return False
        return again == self._theirs or (not exactly and distance(again, self._theirs) <= self._limit)

    def _sampler(self) -> RemoteSampler:
        """Of the weights that the server has."""
        assert self._loaded is not None  # by `refresh`
        generation, concurrency = self._server.generation, self._server.config.concurrency
        return RemoteSampler(generation, self._model, self._eos, concurrency, self._loaded.folder.name, self._over)

    def _snapshot(self) -> Weights:
        """The student's weights, in a folder: all of them, or the adapter."""
        newest, version = self._newest, self._student.version
        if newest is None or newest.version != version or not newest.folder.is_dir():
            folder = self._new_folder()
            with _written(folder):
                save_weights(self._student.model, folder)
            self._newest = newest = Weights(version, folder, self._score())
        return newest

    def _new_folder(self) -> Path:
        """For the next weights."""
        self._folders += 1
        if self._folder is None:
            self._folder = self._server.folder(weights_size(self._student.model))
        return self._folder / f"{self._server.name}-{self._folders:06d}"

    def _drop(self, weights: Weights | None) -> None:
        """Removes a folder that nobody holds and that the server will not read again."""
        reread = self._server.loader.rereads and weights is self._ordered
        if weights is not None and weights not in self._held and not reread:
            shutil.rmtree(weights.folder, ignore_errors=True)

    def _check_loaded(self, weights: Weights) -> None:
        """The server gives a text the log-probs that the student gives it."""
        theirs, ours = self._ask(), weights.logprobs
        error, moved = distance(theirs, ours), distance(ours, self._ours) if self._ours else 0.0
        stale = theirs == self._theirs and moved > MOVED
        if stale or error > self._limit:
            found = f"as it gave before, where the student's have moved by {moved:.4f}" if stale else f"{error:.4f} off"
            raise ServerError(
                f"the sampling server at {self._server.connection.url} has other weights than the student after it "
                f"loaded them: its log-probs of a text are {found} (nats, on average; {self._limit:.4f} is let pass). Does "
                f"it serve {self._student.config.student.path}, does nobody else change its weights, and can it load all "
                f"of them (docs/teachers/servers.md)? The same command goes on where the run stopped"
            )
        self._theirs, self._ours = theirs, ours
        self._limit = min(self._limit, GROWTH * error + MARGIN)

    def _ask(self) -> list[float]:
        server = CompletionsServer(self._model, self._server.connection)
        return server.score([self._server.probe], "prompt_logprobs", 1.0)[0].logprobs

    @torch.no_grad()
    def _score(self) -> list[float]:
        model: Any = self._student.model  # not what DDP or FSDP made of it: the other processes are elsewhere
        ids = torch.tensor([self._server.probe], device=self._student.device)
        with undisturbed(model):
            logits = model.eval()(input_ids=ids, use_cache=False).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).flatten()
        return [0.0, *check_finite(logprobs, "student").tolist()]  # nothing predicts the first token


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """While open, weights are written there; of those that have no room nothing stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ServerError(
            f"the student's weights cannot be written to {folder} for the sampling server: {brief(error)}. Make room, or "
            f"name another folder (sampling.server.weights), and give the same command: the run goes on where it stopped"
        ) from error


def _mapped(path: Path) -> Tensor:
    """The bytes of a file, uint8; they stay when it is removed."""
    size = path.stat().st_size
    return torch.from_file(str(path), size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
