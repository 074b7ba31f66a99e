"""A checkpoint as a live transformers model: checked by our own reader first, failures said in one line."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mftmerge.checkpoint import INDEX, SINGLE, Checkpoint, read_config, resolve
from mftmerge.errors import BadInput
from mftmerge.files import refuse_pointers
from mftmerge.machine import lacks_bfloat16

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = TypeVar("Loaded")
# For `generate`: the likeliest token each time, whatever the model's own generation settings are.
GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
LEAK = 1e-4  # of a token's own weight in what is said there: what the next one's is in no encoder, and rounding may be


def parts(reference: str | Path) -> tuple[Path, Path | None]:
    """The model's directory, and the adapter's where it is written as `model+adapter` (directories or hub ids)."""
    model, plus, adapter = str(reference).rpartition("+")
    if not plus or Path(reference).expanduser().exists():
        return resolve(reference), None
    found = resolve(adapter)
    if not (found / "adapter_config.json").exists():
        raise BadInput(f"{adapter}: no adapter_config.json in it; after the + stands a LoRA adapter")
    return resolve(model), found


def load_causal_lm(
    path: Path,
    *,
    adapter: Path | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool | None = None,
) -> PreTrainedModel:
    """The causal language model in a checkpoint directory, on the CPU. dtype: torch's or its name; "auto": as stored.

    adapter: directory of a LoRA adapter that is merged into it, in that type.
    trust_remote_code: whether Python code that comes with the checkpoint may run; otherwise a model that needs it is
    refused, and nobody is asked. None: as MFTMERGE_TRUST_REMOTE_CODE=1 in the environment says, else not.
    Raises BadInput where the directory is no sound checkpoint, where its configuration is none that transformers
    knows, where the files lack weights, which transformers would fill with random numbers, and where the model sees the
    tokens that it is to predict.
    """
    from transformers import AutoModelForCausalLM

    check_directory(path)

    def load() -> tuple[PreTrainedModel, dict[str, Any]]:
        found: Any = AutoModelForCausalLM.from_pretrained(  # a pair, because of output_loading_info
            path, dtype=dtype, output_loading_info=True, trust_remote_code=trusted(trust_remote_code)
        )
        model, report = found
        return model, report

    model, report = _guarded(path, "as a causal language model", load)
    if missing := sorted(report["missing_keys"]):
        raise BadInput(f"{path}: {len(missing)} weights are missing ({missing[0]}, ...); is the model of another kind?")
    if _looks_ahead(model):
        raise BadInput(
            f"{path}: no causal language model: {type(model).__name__} with this configuration sees the tokens that it "
            "is to predict, as encoders do; give a model that writes text from left to right"
        )
    return model if adapter is None else _merged(model, adapter)


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether what the model says at a token depends on the token after it.

    transformers loads encoders as causal models too (BERT and its kin, XLNet), and a decoder's configuration may switch
    its causal mask off. Most classes say themselves what they are; the others are tried: the gradient of the first of
    two tokens' logits by the second one's embedding is zero in a causal model, exactly, in any precision.
    """
    import torch

    attention = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    config = model.config.get_text_config()
    if attention == {True} and getattr(config, "is_causal", True):
        return False
    embedded: list[torch.Tensor] = []

    def remember(_: torch.nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[0].clone()  # which may be written into

    try:
        hook = model.get_input_embeddings().register_forward_hook(remember)
        try:
            with torch.enable_grad():
                first = config.vocab_size // 3  # away from both ends, where special tokens are
                ids = torch.tensor([[first, first + 1]], device=model.device)
                said = model(input_ids=ids, use_cache=False).logits[0, 0].float().square().sum()
                (slope,) = torch.autograd.grad(said, embedded[0])
        finally:
            hook.remove()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever the model's own code raises: what cannot be tried is not refused
        return False
    own, following = slope.reshape(2, -1).float().abs().amax(1).tolist()  # (1, 2, hidden), XLNet's (2, 1, hidden)
    return bool(following > LEAK * own)


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise BadInput(f"{adapter}: this adapter does not fit the model ({reason.strip()[:200]})") from None
    return merged


def load_model(
    reference: str | Path, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model (`model`, or `model+adapter`) in evaluation mode, and its tokenizer.

    dtype: as for `chosen_dtype`. device: "cuda" where there is one by default. Raises BadInput, see `load_causal_lm`.
    """
    path, adapter = parts(reference)
    chosen = chosen_dtype(path, dtype, device=device)
    model = load_causal_lm(path, adapter=adapter, dtype=chosen, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    try:
        return placed(model, device).eval(), tokenizer
    except (RuntimeError, ValueError, AssertionError) as e:  # the last one: torch was built without CUDA
        raise BadInput(f"--device {device}: {' '.join(str(e).split())[:200]}") from None


def ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's generation settings."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(e for e in ends if e is not None)


def placed(model: PreTrainedModel, device: torch.device | str | None = None) -> PreTrainedModel:
    """The model, moved to a device: by default this process's GPU where there is one, else the CPU."""
    import torch

    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' `to` is untyped


def load_tokenizer(path: Path, *, trust_remote_code: bool | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint directory. Raises BadInput where there is none; see `load_causal_lm`."""
    from transformers import AutoTokenizer

    if path.is_dir():
        refuse_pointers(path)

    def load() -> PreTrainedTokenizerBase:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trusted(trust_remote_code)
        )
        return found

    return _guarded(path, "with its tokenizer", load)


def check_directory(path: Path) -> None:
    """Raise BadInput unless the configuration is a JSON object and the safetensors files in the directory are sound."""
    if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        raise BadInput(
            f"{path}: an adapter (PEFT), not a model; merge it into its base first (merge_and_unload, save_pretrained)"
        )
    if not (path / "config.json").exists():
        raise BadInput(f"{path}: no config.json in it; give the directory of a transformers model")
    read_config(path)
    refuse_pointers(path)
    if (path / SINGLE).exists() or (path / INDEX).exists():
        Checkpoint.open(path)


def chosen_dtype(path: Path, asked: str, *, device: str | None = None) -> str:
    """The type to load the weights in, by torch's name, or "auto" for as stored.

    asked: "auto" becomes "float32" where 16-bit weights, or some of them, would be computed with on a processor that
    has no bfloat16 arithmetic, which is several times slower there (`benchmarks/busy_machine.py`), and float32 fits in
    half of the memory that is free. device: where the model will run, a GPU where there is one by default.
    """
    from psutil import virtual_memory
    from torch import cuda

    if asked != "auto" or not (device or ("cuda" if cuda.is_available() else "cpu")).startswith("cpu"):
        return asked
    if not lacks_bfloat16() or not ((path / SINGLE).exists() or (path / INDEX).exists()):
        return asked
    entries = list(Checkpoint.open(path))
    # One type serves the whole model: of a file that mixes them transformers takes the configuration's.
    halves = any(e.dtype in ("BF16", "F16") for e in entries)
    fits = sum(math.prod(e.shape) for e in entries) * 4 <= virtual_memory().available / 2
    return "float32" if halves and fits else asked


def trusted(given: bool | None) -> bool:
    """Whether a model's own code may be run; None: as MFTMERGE_TRUST_REMOTE_CODE=1 in the environment says."""
    return os.environ.get("MFTMERGE_TRUST_REMOTE_CODE", "0") not in ("", "0") if given is None else given


def _guarded(path: Path, what: str, load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives. transformers raises many kinds of error for what is wrong with a checkpoint."""
    from pickle import UnpicklingError

    from torch import OutOfMemoryError

    try:
        return load()
    except (OutOfMemoryError, MemoryError):
        raise
    except UnpicklingError:  # torch's message advises to run the code
        raise BadInput(f"{path}: its pickled weights cannot be read without running code in them") from None
    except Exception as e:  # nothing but transformers and what it stands on has run
        error = e
    if "trust_remote_code" in str(error):
        raise BadInput(
            f"{path}: this model needs Python code that comes with it; look at that code, and if you trust it "
            "set MFTMERGE_TRUST_REMOTE_CODE=1 (train: --trust-remote-code)"
        ) from None
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise BadInput(f"{path}: cannot be loaded {what} ({reason.strip()[:300]})") from None
