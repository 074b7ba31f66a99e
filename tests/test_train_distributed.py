"""Two processes give the mask that one gives: DDP and FSDP2 through the whole command, FSDP2 through the optimiser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mftmerge.errors import BadInput
from mftmerge.mask import Mask
from mftmerge.train import scores, targets
from mftmerge.train.optimizer import MaskOptimizer
from mftmerge.train.run import train_mask

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
# Without a GPU too, --multi_gpu is what makes accelerate start several processes itself (--cpu leaves it to MPI).
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2"]
ROWS = [{"prompt": f"count from {i}", "completion": " ".join(str(j) for j in range(i, i + 6))} for i in range(40)]
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "magnitude": {"init": "magnitude"},
    "normal": {"init": "normal", "signed": False},
    "global": {"init": "magnitude", "scope": "global", "keep": 0.8},
    "ties": {"init": "ties", "keep": 0.7},
}


def launch(*command: str, fails: bool = False) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    environment |= {"STOP": "1"} if fails else {}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def batches(step: int) -> list[torch.Tensor]:
    """Two batches, one a rank."""
    g = torch.Generator().manual_seed(step)
    return [torch.randint(3, 250, (2, 12), generator=g) for _ in range(2)]


def train(path: Path, case: dict[str, Any], rank: int | None) -> dict[str, torch.Tensor]:
    """Masks and scores after some steps: by one process (rank None) or by one of two ranks of FSDP2."""
    options = dict(case)
    init = options.pop("init")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").train()
    found = targets.find(model, "2-3")
    targets.freeze_others(model, found)
    start = scores.initial(found, "magnitude" if init == "ties" else init)
    if init == "ties":  # a few values only: the cut lies inside a large class of equal scores
        start = {n: (s * 400).round() / 400 for n, s in start.items()}
    if rank is not None:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        found = targets.find(model, "2-3")
    optimizer = MaskOptimizer(found, start, lr=0.0 if init == "ties" else 5e-3, **options)
    for step in range(STEPS):
        if rank is None:
            halves = []
            for ids in batches(step):
                model(input_ids=ids, labels=ids).loss.backward()
                halves.append({t.name: t.parameter.grad for t in found})
                for t in found:
                    t.parameter.grad = None
            for t in found:
                t.parameter.grad = (halves[0][t.name] + halves[1][t.name]) / 2
        else:
            ids = batches(step)[rank]
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = {f"{n}::mask": m for n, m in optimizer.mask().items()}
    return kept | {f"{n}::score": s for n, s in optimizer.scores().items()}


def worker(path: str, out: str, backend: str) -> None:
    """One rank of the FSDP2 test."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(backend)
    rank = torch.distributed.get_rank()
    result = {name: train(Path(path), case, rank) for name, case in CASES.items()}
    torch.save(result, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_on_two_ranks_gives_the_mask_of_one_process(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("llama")
    (tmp_path / "worker.py").write_text(
        f"import test_train_distributed as t\nt.worker({str(path)!r}, {str(tmp_path)!r}, 'gloo')\n".replace(
            "\\\n", "\n"
        )
    )
    launch(*TORCHRUN, "29611", str(tmp_path / "worker.py"))
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for name, case in CASES.items():
        expected = train(path, case, None)
        for key, value in expected.items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key])
            if key.endswith("::mask"):
                assert torch.equal(ranks[0][name][key], value), (name, key)
            else:
                torch.testing.assert_close(ranks[0][name][key], value, rtol=1e-5, atol=1e-7)


COMMAND = """
import os
from mftmerge.cli.main import main
from {module} import {optimizer} as Optimizer

step = Optimizer.step

def stop_after_some(self, closure=None):
    if self.steps == {steps}:
        os._exit(9)
    return step(self, closure)

if "STOP" in os.environ:
    Optimizer.step = stop_after_some
main()
"""


def write_command(path: Path, optimizer: type, steps: int) -> None:
    """A program that is the command line, and that dies after so many steps of the optimiser when `launch` wants it."""
    path.write_text(COMMAND.format(module=optimizer.__module__, optimizer=optimizer.__name__, steps=steps))


def finish(*command: str, resumed: bool) -> str:
    """What a whole command says. resumed: what it says when it goes on after it died."""
    if resumed:
        launch(*command, fails=True)
        command = (*command, "--resume")
    return launch(*command)


@pytest.fixture
def run(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Mask]:
    """`run(name, batch size, launcher...)`: the mask of the whole command after 2 steps of 2 batches each."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    write_command(tmp_path / "run.py", MaskOptimizer, steps=1)
    options = ["train", "-m", str(tiny("llama")), "-d", str(rows), "--layers", "2-3", "--steps", "2"]

    def command(name: str, size: int, *launcher: str, resumed: bool = False) -> Mask:
        out = tmp_path / f"{name}.mask"
        own = ["-o", str(out), "--batch-size", str(size), "--accumulate", "2", "--save-every", "1"]
        said = finish(*launcher, str(tmp_path / "run.py"), *options, *own, resumed=resumed)
        assert said.count("learning rate") == 1  # one process speaks
        assert said.count("resuming at step 1") == resumed
        assert not Path(f"{out}.run").exists()
        return Mask.load(out)

    return command


def assert_same(a: Mask, b: Mask) -> None:
    assert a.names == b.names
    bits = sum(int((a.kept(n) != b.kept(n)).sum()) for n in a.names)
    assert bits <= 4  # of 86,016: the ranks' gradients are added in another order
    np.testing.assert_allclose(a.info.training["validation"], b.info.training["validation"], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_give_the_mask_of_one(run: Callable[..., Mask]) -> None:
    one = run("one", 8, sys.executable)
    assert_same(one, run("ddp", 4, *ACCELERATE, "--multi_gpu", "--main_process_port", "29612"))
    assert_same(one, run("fsdp", 4, *ACCELERATE, *FSDP2, "--main_process_port", "29614", resumed=True))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "only FSDP2 is supported: launch with --use_fsdp --fsdp_version 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params false"),
    ],
)
def test_other_kinds_of_fsdp_are_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=message):
        train_mask(tiny("llama"), ROWS, steps=1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fsdp2_on_two_gpus_gives_equal_masks_on_both(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(
        "import os, torch\ntorch.cuda.set_device(int(os.environ['LOCAL_RANK']))\n"
        f"import test_train_distributed as t\nt.worker({str(tiny('llama'))!r}, {str(tmp_path)!r}, 'nccl')\n"
    )
    launch(*TORCHRUN, "29613", str(tmp_path / "worker.py"))
    a, b = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert all(torch.equal(a[c][k], b[c][k]) for c in a for k in a[c])
