"""What the server serves: one model, its tokenizer, and masks that come and go."""

from __future__ import annotations

import re
from pathlib import Path

from mftmerge import matching
from mftmerge.attachment import Attachment
from mftmerge.checkpoint import Checkpoint, resolve
from mftmerge.errors import BadInput
from mftmerge.live import Switcher
from mftmerge.loading import load_model
from mftmerge.mask import Mask
from mftmerge.serve.engine import Engine
from mftmerge.serve.settings import ServeSettings

NAME = re.compile(r"[\w][\w.:@/-]{0,99}")
LONG = 1 << 20  # positions of a model that names no limit


class Service:
    """A model with masks behind an engine. name: of the model without mask; room: positions that it has."""

    def __init__(self, model: str, settings: ServeSettings) -> None:
        self.settings = settings
        path = resolve(model)
        self.name = settings.name or Path(model.rstrip("/")).name.partition("@")[0]
        self._require_name(self.name)
        masks = {name: Mask.load(file) for name, file in settings.mask.items()}  # before the model, which takes longer
        self._checkpoint = Checkpoint.open(path)
        live, self.tokenizer = load_model(path, dtype=settings.dtype, device=settings.device)
        config = live.config.get_text_config()
        self.room = int(getattr(config, "max_position_embeddings", None) or LONG)
        self.vocabulary = int(config.vocab_size)
        self.notes: list[str] = []
        attachment = Attachment(live, {n for mask in masks.values() for n in mask.names})
        for name, mask in masks.items():
            self._require_name(name)
            self.notes += [f"{name}: {note}" for note in self._check(mask)]
        attachment.add(masks, settings.base, settings.on)
        self._switcher = Switcher(attachment)
        with self._switcher.batch([None]):
            pass  # a model or mask that cannot be served in batches is refused now
        limits = {"max_rows": settings.max_rows, "max_queue": settings.max_queue, "max_prompt": settings.max_prompt}
        self.engine = Engine(live, self.tokenizer, self._switcher, **limits)
        self._leaving: set[str] = set()

    @property
    def masks(self) -> tuple[str, ...]:
        """Names of the masks that can be asked for."""
        return tuple(name for name in self._switcher.names if name not in self._leaving)

    def mask_of(self, model: str) -> str | None:
        """The mask that a request's `model` means; None for none. Raises KeyError for an unknown one."""
        if model == self.name:
            return None
        if model not in self.masks:
            raise KeyError(model)
        return model

    def add(self, name: str, file: Path) -> list[str]:
        """Attach the mask in a file between two steps of the engine. Returns remarks. Raises BadInput."""
        self._require_name(name)
        mask = Mask.load(file)
        notes = self._check(mask)
        for tensor in mask:
            mask.packed(tensor)  # reads and checks every bit, outside the engine's thread
        self.engine.command(lambda: self._attach(name, mask)).result()
        return notes

    def _attach(self, name: str, mask: Mask) -> None:
        self._switcher.add(name, mask, base=self.settings.base, on=self.settings.on)
        try:
            with self._switcher.batch([name]):
                pass
        except BadInput:
            self._switcher.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Let go of a mask, once the answers under it are written; new ones are refused at once. Raises KeyError."""
        if name not in self.masks:
            raise KeyError(name)
        self._leaving.add(name)
        try:
            self.engine.command(lambda: self._switcher.remove(name), unused=name).result()
        finally:
            self._leaving.discard(name)

    def _check(self, mask: Mask) -> list[str]:
        """Whether a mask is for this model. Raises BadInput where it is not, or not exactly and that is asked for."""
        names = matching.match(mask, self._checkpoint, self.name)
        found = matching.base_difference(names, mask, self._checkpoint)
        if self.settings.require_base and found is None:
            raise BadInput("the mask records no fingerprints of its base, so --require-base cannot be checked")
        if found is None or not found.tensors:
            return []
        if self.settings.require_base:
            raise BadInput(f"{found}, and --require-base allows no difference")
        return [str(found)]

    def _require_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise BadInput(f"{name[:100]!r} is no name for a model: letters, digits and . : @ / - _, up to 100 of them")
        if name == self.name and hasattr(self, "_checkpoint"):
            raise BadInput(f"{name!r} is the name of the model without mask; choose another (or another --name)")
