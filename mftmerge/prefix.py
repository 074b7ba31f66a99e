"""Cheap forward passes: the layers below the first masked one computed once a row.

The layers below the first masked layer are the same in every epoch, for every mask, so their output for a row is too.
`PrefixCache` keeps it. Inside `with cache.use():` any forward pass of the model over rows that it knows (padded on the
right, no key-value cache) skips these layers; every other pass runs as always. Nobody who calls the model has to know.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mftmerge.data import Tokens
from mftmerge.naming import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)
SHARE = 0.4  # of the free memory that states may fill


class PrefixCache:
    """Hidden states that enter decoder layer `first_layer`, by row, computed when a row is first seen.

    Each row is computed on its own, without padding, so that a state does not depend on what it was batched with: a run
    that is resumed reads the same numbers. Rows share one memory budget; beyond it they are computed every time.

    directory: keep the states in a file there (deleted with the cache) instead of in memory.
    budget: bytes to use at most; None is 40 % of what is free at the start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        first_layer: int,
        *,
        directory: str | Path | None = None,
        budget: int | None = None,
    ) -> None:
        self.model, self.first_layer = model, first_layer
        self._layers = list(decoder_layers(model)[1])
        self._store: _Memory | _File = _File(Path(directory)) if directory is not None else _Memory()
        self._budget = budget if budget is not None else _budget(directory)
        self._lengths: set[int] = set()
        self._known: set[bytes] = set()
        self._states: Tensor | None = None  # what the batch that runs now gets; None: it runs all layers
        self._busy = self._checked = self._off = False
        self.why = ""  # states cannot be taken from here
        self._noisy: bool | None = None  # lower layers draw random numbers in training; None: not known yet
        self._widths: dict[int, int] = {}  # lower layer -> how many values it returns, where it returns a tuple
        self._token_bytes = 0

    @classmethod
    def as_set(cls, model: PreTrainedModel, first_layer: int, place: str) -> PrefixCache | None:
        """A cache as the setting `prefix` says (memory, disk or off); None where there is nothing to keep."""
        if place == "off" or not first_layer:
            return None
        return cls(model, first_layer, directory=tempfile.gettempdir() if place == "disk" else None)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[Tokens]) -> None:
        """Make rows known. Nothing is computed yet."""
        for row in rows:
            self._known.add(_key(row["input_ids"]))
            self._lengths.add(len(row["input_ids"]))

    def nbytes(self, rows: Sequence[Tokens]) -> int:
        """Bytes that the states of `rows` take."""
        return sum(len(r["input_ids"]) for r in rows) * self._token_bytes if rows and self.fits(rows[0]) else 0

    def fits(self, row: Tokens) -> bool:
        """Whether the model gives the same results from stored states: tried once, on this row.

        Where it does not (layers that hand on other things than hidden states), all layers run, as without a cache, and
        `why` says why.
        """
        if not self._checked:
            self._checked = True
            try:
                with self.use():
                    self.why = self._misfit(row["input_ids"])
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as e:  # whatever the model's own code raises when layers are left out
                self.why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
            self._off = bool(self.why)
            if self._off:
                log.info("%s: no cached states (%s)", type(self.model).__name__, self.why)
        return not self._off

    def serves(self, rows: Sequence[Tokens], first: Tokens, say: Callable[[str], None]) -> bool:
        """Make rows known, and tell whether states serve, tried on the row `first`; where not, `say` is told why."""
        self.add(rows)
        if not self.fits(first):
            say(f"states of the layers below cannot be cached for this model ({self.why}): all layers run")
        return not self._off

    @property
    def stored_bytes(self) -> int:
        """Bytes stored so far."""
        return self._store.used

    # -- use ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self) -> Iterator[PrefixCache]:
        """Let the model take known rows' states from here inside the block. Blocks may be nested."""
        lower = self._layers[: self.first_layer]
        if not lower or self._off or "forward" in vars(lower[0]):
            yield self
            return
        embedding = self.model.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(self._on_embedding)
        try:
            for number, layer in enumerate(lower):
                layer.forward = partial(self._lower_forward, number, layer.forward)
            yield self
        finally:
            hook.remove()
            self._states = None
            for layer in lower:
                vars(layer).pop("forward", None)

    def _on_embedding(self, _: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not self._busy:
            known = not self._off and bool(args) and args[0].ndim == 2
            self._states = self._find(args[0]) if known else None

    def _lower_forward(self, number: int, real: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        if self._states is None or kwargs.get("past_key_values") is not None:
            out = real(*args, **kwargs)
            if isinstance(out, tuple):
                self._widths[number] = len(out)
            return out
        found = self._states
        if number < self.first_layer - 1:
            found = args[0] if args else kwargs["hidden_states"]
        # What a layer gives beside its states (attention weights) is not asked for in training.
        return (found, *[None] * (self._widths[number] - 1)) if number in self._widths else found

    def _find(self, ids: Tensor) -> Tensor | None:
        """States of a padded batch, shape (rows, length, hidden), or None when a row of it is not known."""
        found = []
        for row in ids.tolist():
            # The longest known row that this one starts with: what follows is padding, which a causal model's
            # earlier positions never see.
            length = next((n for n in sorted(self._lengths, reverse=True) if _is(self._known, row, n)), None)
            if length is None or len(set(row[length:])) > 1:
                return None
            found.append(row[:length])
        states = [self._row(row) for row in found]
        if any(s is None for s in states):
            return None
        first = states[0]
        assert first is not None
        out = torch.zeros(*ids.shape, first.shape[-1], dtype=first.dtype, device=ids.device)
        for i, s in enumerate(states):
            assert s is not None
            out[i, : len(s)] = s
        return out

    def _row(self, ids: list[int]) -> Tensor | None:
        if not self.fits({"input_ids": ids}) or (self.model.training and self._draws(ids)):
            return None
        key = self._store_key(ids)
        states = self._store.get(key)
        if states is None:
            states = self._compute(ids)
            if self._store.used + states.nbytes <= self._budget:
                self._store.put(key, states)
        return states

    def _misfit(self, ids: list[int]) -> str:
        """Why states of this row do not serve, "" where they do."""
        states = self._compute(ids)
        if states.ndim != 2 or len(states) != len(ids):
            return f"layers hand on {states.ndim + 1} dimensions"
        self._token_bytes = states.nbytes // len(ids)
        with torch.no_grad():
            expected = self._full(ids)[0]
            found = self._full(ids, states[None])[0]
        error = (found - expected).abs().max()
        if not bool(error <= 64 * torch.finfo(expected.dtype).eps * expected.abs().max()):
            return "other results"
        if self._store.used + states.nbytes <= self._budget:
            self._store.put(self._store_key(ids), states)
        return ""

    def _store_key(self, ids: list[int]) -> bytes:
        """Of a row's states: inside autocast the same layers give other numbers."""
        return _key(ids) + bytes([torch.is_autocast_enabled(self.model.device.type)])

    def _draws(self, ids: list[int]) -> bool:
        """Whether the lower layers are others in training: they draw random numbers (dropout, layers that are left out
        at random), or compute something else. Then every pass must run them."""
        if self._noisy is None:
            device = self.model.device
            devices = [device] if device.type == "cuda" else []
            before = random.getstate()
            with torch.random.fork_rng(devices):
                states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
                training = self._compute(ids, training=True)
                after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
            drawn = random.getstate() != before or not all(map(torch.equal, states, after))
            random.setstate(before)
            self._noisy = drawn or not torch.equal(training, self._compute(ids))
        return self._noisy

    @torch.no_grad()
    def _compute(self, ids: list[int], *, training: bool = False) -> Tensor:
        """Run one row through the lower layers and stop at the first masked one: shape (length, hidden)."""

        class Reached(Exception):
            pass

        caught: list[Tensor] = []

        def stop(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args[0] if args else kwargs["hidden_states"])[0])
            raise Reached

        hook = self._layers[self.first_layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._full(ids, training=training)
        except Reached:
            pass
        finally:
            hook.remove()
        return caught[0].detach().clone()

    def _full(self, ids: list[int], states: Tensor | None = None, *, training: bool = False) -> Any:
        """The pass of one row through the model's body (its head may be hooked), through all layers or from states."""
        before, was_training = self._states, self.model.training
        self._busy, self._states = True, states
        self.model.train(training)
        try:
            batch = torch.tensor([ids], device=self.model.device)
            return self.model.base_model(input_ids=batch, use_cache=False)
        finally:
            self._busy, self._states = False, before
            self.model.train(was_training)


class _Memory:
    def __init__(self) -> None:
        self._rows: dict[bytes, Tensor] = {}
        self.used = 0

    def get(self, key: bytes) -> Tensor | None:
        return self._rows.get(key)

    def put(self, key: bytes, states: Tensor) -> None:
        self._rows[key] = states.cpu()  # the computer's memory, whose size the budget is a share of
        self.used += states.nbytes


class _File:
    """States one after another in an unnamed file, which the system deletes with the process."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._places: dict[bytes, tuple[int, Tensor]] = {}
        self.used = 0

    def get(self, key: bytes) -> Tensor | None:
        if key not in self._places:
            return None
        start, like = self._places[key]
        raw = bytearray(os.pread(self._file.fileno(), like.nbytes, start))
        return torch.frombuffer(raw, dtype=torch.uint8).view(like.dtype).view(like.shape).to(like.device)

    def put(self, key: bytes, states: Tensor) -> None:
        raw = states.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        os.pwrite(self._file.fileno(), raw, self.used)
        # An expanded scalar remembers shape, dtype and device and takes no memory.
        self._places[key] = (self.used, states.new_zeros(()).expand(states.shape))
        self.used += len(raw)


def _key(ids: Sequence[int]) -> bytes:
    return torch.tensor(ids, dtype=torch.int64).numpy().tobytes()


def _is(known: set[bytes], row: list[int], length: int) -> bool:
    return length <= len(row) and _key(row[:length]) in known


def _budget(directory: str | Path | None) -> int:
    import shutil

    import psutil

    free = psutil.virtual_memory().available if directory is None else shutil.disk_usage(Path(directory).parent).free
    return int(SHARE * free / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # processes of one launcher share it
