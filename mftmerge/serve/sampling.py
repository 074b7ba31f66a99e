"""Choosing a token: greedy, or drawn with temperature and top-p from a row's own generator; log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sampling:
    """How one answer's tokens are chosen. logprobs: number of alternatives to report, None for no log-probabilities."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the token is simply the most likely one."""
        return self.temperature == 0 and self.logprobs is None and not self.logit_bias and not self._penalised

    @property
    def _penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty)

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of the number-th answer to a request."""
        made = torch.Generator()
        if self.seed is None:
            made.seed()
        else:
            made.manual_seed((self.seed + number * 0x9E3779B97F4A7C15) % (1 << 63))
        return made


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability (before temperature and top-p), and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, written: list[int]) -> Chosen:
    """One token from logits of shape (vocabulary,), on the CPU. written: the answer's tokens so far."""
    logits = logits.float()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if sampling._penalised and written:
        tokens, counts = torch.tensor(written).unique(return_counts=True)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    token = int(logits.argmax()) if sampling.temperature == 0 else _drawn(logits, sampling, generator)
    if sampling.logprobs is None:
        return Chosen(token)
    likely = logits.log_softmax(-1)
    best = likely.topk(min(sampling.logprobs, len(likely))) if sampling.logprobs else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return Chosen(token, float(likely[token]), top)


def _drawn(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    # From the largest one, and divided by a number that float32 has: the smallest temperatures ask for the likeliest.
    temperature = max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    likely = ((logits - logits.max()) / temperature).softmax(-1)
    if sampling.top_p >= 1:
        return int(likely.multinomial(1, generator=generator))
    values, tokens = likely.sort(descending=True)
    values[values.cumsum(-1) - values > sampling.top_p] = 0  # the token that passes the threshold stays
    return int(tokens[values.multinomial(1, generator=generator)])
