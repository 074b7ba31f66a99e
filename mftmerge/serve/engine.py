"""Many answers at a time, each under its own mask: a thread that decodes one batch and lets rows join between steps."""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.live import Switcher
from mftmerge.loading import ends
from mftmerge.rowmasks import RowMasks
from mftmerge.serve.rowcache import RowCache
from mftmerge.serve.sampling import Chosen, Sampling, choose
from mftmerge.serve.text import Transcript

Reason = Literal["stop", "length"]
CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class Busy(MftmergeError):
    """As many requests wait as may."""


class Stopping(MftmergeError):
    """The server takes no more requests."""


@dataclass(frozen=True)
class Event:
    """What happened to one answer: new text, with the tokens that it comes from; why it ended, or an error."""

    index: int
    text: str = ""
    tokens: tuple[Chosen, ...] = ()
    reason: Reason | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        return self.reason is not None or self.error is not None


@dataclass
class Job:
    """A request. mask: None for the model without mask. emit: called with each event, from the engine's thread."""

    mask: str | None
    prompt: list[int]
    max_tokens: int
    emit: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    count: int = 1
    cancelled: bool = False  # set by anybody who no longer wants the answer


class _Row:
    """One answer that waits or is being written."""

    def __init__(self, job: Job, index: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.job, self.index = job, index
        self.transcript = Transcript(tokenizer, job.stop)
        self.generator = job.sampling.generator(index)
        self.written: list[int] = []

    def take(self, chosen: Chosen, ends: list[int]) -> bool:
        """Take up a token and tell of it; returns whether it was the last one."""
        reason: Reason | None = None
        text = ""
        self.written.append(chosen.token)
        if chosen.token in ends:
            reason = "stop"
        else:
            text = self.transcript.add(chosen.token)
            if self.transcript.stopped:
                reason = "stop"
            elif len(self.written) >= self.job.max_tokens:
                reason = "length"
        if reason is not None:
            text += self.transcript.finish()
        shown = () if chosen.token in ends else (chosen,)
        self.job.emit(Event(self.index, text, shown, reason))
        return reason is not None


@dataclass
class _Command:
    """Work on the masks, between two steps, once no answer needs `unused`."""

    run: Callable[[], object]
    unused: str | None
    result: Future[object]


class Engine:
    """Runs a model for many requests. Start it with `start`; `submit` and `command` are for any thread.

    max_rows: answers written at a time. max_queue: answers that may wait. max_prompt: prompt tokens read in one step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        switcher: Switcher,
        *,
        max_rows: int,
        max_queue: int,
        max_prompt: int,
    ) -> None:
        self.model, self.tokenizer, self.switcher = model.eval(), tokenizer, switcher
        self.max_rows, self.max_queue, self.max_prompt = max_rows, max_queue, max_prompt
        _require_cached_layers(model)
        self.ends = ends(model, tokenizer)
        takes = inspect.signature(model.forward).parameters
        self._takes_positions, self._takes_last = "position_ids" in takes, "logits_to_keep" in takes
        self._waiting: deque[_Row] = deque()
        self._reading: list[_Row] = []  # their prompts, just now: these neither wait nor are written yet
        self._running: list[_Row] = []
        self._cache: RowCache | None = None
        self._commands: list[_Command] = []
        self._change = threading.Condition()
        self._stopping = False
        self.broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="mftmerge-engine", daemon=True)

    # -- for others ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue requests, all or none. Raises Busy when too many wait, Stopping after `drain`, else MftmergeError."""
        with self._change:
            if self.broken is not None:
                raise MftmergeError(self.broken)
            if self._stopping:
                raise Stopping("the server is stopping; ask another one, or again later")
            count = sum(job.count for job in jobs)
            if len(self._waiting) + count > self.max_queue + max(0, self.max_rows - len(self._running)):
                raise Busy(f"{len(self._waiting)} requests are waiting; ask again later")
            self._waiting += [_Row(job, i, self.tokenizer) for job in jobs for i in range(job.count)]
            self._change.notify()

    def command(self, run: Callable[[], object], unused: str | None = None) -> Future[object]:
        """Run something on the switcher between two steps, when no waiting or running answer is under mask `unused`."""
        future: Future[object] = Future()
        with self._change:
            if self.broken is not None or self._stopping:
                raise Stopping("the server is stopping")
            self._commands.append(_Command(run, unused, future))
            self._change.notify()
        return future

    @property
    def load(self) -> tuple[int, int]:
        """Answers that are being written or whose prompts are being read, and answers that wait."""
        return len(self._reading) + len(self._running), len(self._waiting)

    @property
    def idle(self) -> bool:
        with self._change:  # not between two of the places that an answer goes through
            return not (self._waiting or self._reading or self._running)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def drain(self) -> None:
        """Take no more requests; those there are will be answered."""
        with self._change:
            self._stopping = True
            self._change.notify()

    def close(self, seconds: float = 10.0) -> None:
        """End the thread, when what is there has been answered or `seconds` have gone by."""
        self.drain()
        self._thread.join(seconds)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                while True:
                    with self.switcher.batch([None]) as rows:
                        done = self._serve(rows)
                    if done:
                        return
                    self._run_commands()
        except BaseException as e:
            with self._change:
                self.broken = f"the server is broken: {' '.join(str(e).split()) or type(e).__name__}"
                commands, self._commands = self._commands, []
            self._fail(self.broken, [*self._reading, *self._running, *self._waiting])
            for command in commands:
                command.result.set_exception(MftmergeError(self.broken))
        finally:
            for command in self._commands:
                command.result.cancel()

    def _serve(self, rows: RowMasks) -> bool:
        """Write answers until a command can be run (False) or the end has come (True)."""
        while True:
            with self._change:
                self._forget_cancelled()
                if any(self._ready(c) for c in self._commands):
                    return False
                if self.idle:
                    if self._stopping:
                        return True
                    self._change.wait()
                    continue
                self._reading = joining = self._admitted()
            try:
                if joining:
                    self._read(joining, rows)
                joining = self._running
                if self._running:
                    self._step(rows)
            except Exception as e:  # out of memory, for instance: those answers are lost, the server is not
                self._fail(_unwritten(e), joining)

    def _ready(self, command: _Command) -> bool:
        used = {row.job.mask for row in (*self._running, *self._waiting)}
        return command.unused is None or command.unused not in used

    def _run_commands(self) -> None:
        with self._change:
            ready = [c for c in self._commands if self._ready(c)]
            self._commands = [c for c in self._commands if c not in ready]
        for command in ready:
            try:
                command.result.set_result(command.run())
            except Exception as e:
                command.result.set_exception(e)

    def _forget_cancelled(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.job.cancelled)
        self._keep([row for row in self._running if not row.job.cancelled])

    def _admitted(self) -> list[_Row]:
        """Those that wait the longest, as many as there is room for."""
        joining: list[_Row] = []
        tokens = 0
        while self._waiting and len(self._running) + len(joining) < self.max_rows:
            tokens += len(self._waiting[0].job.prompt)
            if joining and tokens > self.max_prompt:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _read(self, joining: list[_Row], rows: RowMasks) -> None:
        """Read new prompts, choose their first tokens, and let them join."""
        width = max(len(row.job.prompt) for row in joining)
        ids = torch.zeros(len(joining), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(joining):
            ids[place, width - len(row.job.prompt) :] = torch.tensor(row.job.prompt)
            mask[place, width - len(row.job.prompt) :] = 1
        rows.assign([row.job.mask for row in joining])
        read = RowCache(DynamicCache(), mask.to(self.model.device))
        positions = (read.mask.cumsum(1) - 1).clamp(min=0)
        logits = self._logits(ids.to(self.model.device), read, positions)
        self._cache = read if self._cache is None else self._cache.joined(read)
        first = len(self._running)
        with self._change:
            self._running, self._reading = [*self._running, *joining], []
        self._choose(logits, first)

    def _step(self, rows: RowMasks) -> None:
        """One more token for every answer."""
        assert self._cache is not None
        rows.assign([row.job.mask for row in self._running])
        ids = torch.tensor([[row.written[-1]] for row in self._running], device=self.model.device)
        _, positions = self._cache.step()
        self._choose(self._logits(ids, self._cache, positions), 0)

    def _logits(self, ids: torch.Tensor, cache: RowCache, positions: torch.Tensor) -> torch.Tensor:
        """Of the last place, (rows, vocabulary)."""
        more: dict[str, object] = {"position_ids": positions} if self._takes_positions else {}
        more |= {"logits_to_keep": 1} if self._takes_last else {}
        output = self.model(
            input_ids=ids, attention_mask=cache.mask, past_key_values=cache.cache, use_cache=True, **more
        )
        return output.logits[:, -1].float().cpu()

    def _choose(self, logits: torch.Tensor, first: int) -> None:
        """Tokens for the running rows from number `first` on; those that end leave.

        What goes wrong with one row's token (probabilities that are no numbers) costs that answer alone.
        """
        best = logits.argmax(-1).tolist()
        ended: list[_Row] = []
        failed: list[tuple[_Row, Exception]] = []
        for row, scores, token in zip(self._running[first:], logits, best, strict=True):
            sampling = row.job.sampling
            try:
                chosen = Chosen(token) if sampling.plain else choose(scores, sampling, row.generator, row.written)
                if row.take(chosen, self.ends):
                    ended.append(row)
            except Exception as e:
                failed.append((row, e))
        for row, error in failed:
            self._fail(_unwritten(error), [row])
        with self._change:
            self._keep([row for row in self._running if row not in ended])

    def _keep(self, rows: list[_Row]) -> None:
        if len(rows) == len(self._running):
            return
        places = [i for i, row in enumerate(self._running) if row in rows]
        self._cache = self._cache.only(places) if self._cache is not None and places else None
        self._running = rows

    def _fail(self, message: str, rows: list[_Row]) -> None:
        """Tell those who wait for these answers that there will be none."""
        with self._change:
            self._keep([row for row in self._running if row not in rows])
            self._waiting = deque(row for row in self._waiting if row not in rows)
            self._reading = []
        for row in rows:
            row.job.emit(Event(row.index, error=message))


def _unwritten(error: Exception) -> str:
    """What is said of an answer that an error has ended."""
    return f"the answer could not be written ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _require_cached_layers(model: PreTrainedModel) -> None:
    """Raise BadInput for models whose memory of a text is not keys and values alone, so that rows cannot be moved."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.is_encoder_decoder or model._is_stateful or kinds - CACHED_LAYERS:
        raise BadInput(
            f"{type(model).__name__} cannot be served in batches that change (it is no decoder of attention layers)"
        )
