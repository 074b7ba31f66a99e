"""A checkpoint as a live transformers model: checked by our own reader first, failures said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mftmerge.checkpoint import INDEX, SINGLE, Checkpoint, read_config
from mftmerge.errors import BadInput


def load_causal_lm(path: Path, *, dtype: Any = "auto") -> Any:
    """The causal language model in a checkpoint directory, on the CPU. dtype: "auto" (as stored) or torch's.

    Raises BadInput where the directory is no sound checkpoint, where its configuration is none that transformers
    knows, and where the files lack weights, which transformers would fill with random numbers.
    """
    from transformers import AutoModelForCausalLM

    check_directory(path)
    model, report = _guarded(
        path,
        "as a causal language model",
        lambda: AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True),
    )
    if missing := sorted(report["missing_keys"]):
        raise BadInput(f"{path}: {len(missing)} weights are missing ({missing[0]}, ...); is the model of another kind?")
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a checkpoint directory. Raises BadInput where there is none."""
    from transformers import AutoTokenizer

    return _guarded(path, "with its tokenizer", lambda: AutoTokenizer.from_pretrained(path))


def check_directory(path: Path) -> None:
    """Raise BadInput unless the configuration is a JSON object and the safetensors files in the directory are sound."""
    if not (path / "config.json").exists():
        raise BadInput(f"{path}: no config.json in it; give the directory of a transformers model")
    read_config(path)
    if (path / SINGLE).exists() or (path / INDEX).exists():
        Checkpoint.open(path)


def _guarded(path: Path, what: str, load: Any) -> Any:
    """What `load` gives. transformers raises many kinds of error for what is wrong with a checkpoint."""
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    try:
        return load()
    except OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError) as e:
        error: Exception = e
    except (SafetensorError, TypeError, ValueError) as e:
        error = e
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise BadInput(f"{path}: cannot be loaded {what} ({reason.strip()[:300]})") from None
