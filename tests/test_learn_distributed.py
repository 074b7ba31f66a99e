"""Two processes learn the masks of a merge that one learns, at an exact density: DDP, FSDP2 with a kill between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.experts import make_experts, open_recipe
from test_train_distributed import ACCELERATE, FSDP2, finish, launch, write_command

from mftmerge import cut
from mftmerge.errors import BadInput
from mftmerge.learn.optimizer import MergeOptimizer
from mftmerge.learn.parameters import Holders
from mftmerge.learn.run import learn_merge
from mftmerge.mask import Mask
from mftmerge.recipe.build import build
from mftmerge.train.sharding import Shard

STEPS = 3
EXPERTS = ("count", "letters", "say")
Learn = Callable[..., dict[str, Mask]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that differ everywhere, norms and embeddings included; of one the rows have no answers."""
    made = make_experts(tmp_path_factory.mktemp("experts") / "kitchen", layers=())
    path = made / "say.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in rows))
    return made


@pytest.fixture
def learn(folder: Path, tmp_path: Path) -> Learn:
    """`learn(name, batch size, launcher...)`: the masks of the whole command."""
    write_command(tmp_path / "run.py", MergeOptimizer, steps=2)
    recipe = open_recipe(folder)

    def command(name: str, size: int, *launcher: str, resumed: bool = False) -> dict[str, Mask]:
        out = tmp_path / name
        given = f"train --recipe {recipe} -o {out} --steps {STEPS} --batch-size {size} --teacher expert --scores"
        given += " --answer-tokens 4 --save-every 1 --eval-every 1 --density 0.6"
        said = finish(*launcher, str(tmp_path / "run.py"), *given.split(), resumed=resumed)
        assert said.count("rows to learn from") == 1  # one process speaks
        assert said.count("resuming at step 2") == resumed
        assert sorted(p.name for p in out.iterdir()) == sorted([*(f"{n}.mask" for n in EXPERTS), "recipe.yml"])
        return {n: Mask.load(out / f"{n}.mask") for n in EXPERTS}

    return command


def keep_count(size: int) -> int:
    return size - cut.drop_count(size, cut.exact("0.6"))


def assert_same(one: dict[str, Mask], other: dict[str, Mask]) -> None:
    for expert, mask in one.items():
        theirs = other[expert]
        assert mask.names == theirs.names
        differ = sum(int((mask.kept(n) != theirs.kept(n)).sum()) for n in mask.names)
        # Ranks add their gradients in another order.
        assert differ <= 4  # of 205,760
        np.testing.assert_allclose(mask.info.training["validation"], theirs.info.training["validation"], rtol=1e-5)
        assert mask.info.training["best_step"] == theirs.info.training["best_step"] > 0


def alone(folder: Path, **settings: object) -> dict[str, Mask]:
    """What this process learns, with the batch of two."""
    return learn_merge(open_recipe(folder), batch_size=4, **settings).masks


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(learn: Learn, folder: Path, tmp_path: Path) -> None:
    one = alone(folder, teacher="expert", steps=STEPS, answer_tokens=4, eval_every=1, scores=True, density=0.6)
    assert_same(one, learn("ddp", 2, *ACCELERATE, "--multi_gpu", "--main_process_port", "29621"))
    sharded = learn("fsdp", 2, *ACCELERATE, *FSDP2, "--main_process_port", "29622", resumed=True)
    assert_same(one, sharded)
    for name in one["count"].names:  # whole tensors, from the rows of all ranks
        initial, same = sharded["count"].initial_scores(name), one["count"].initial_scores(name)
        assert np.array_equal(initial, same)
    # A matrix is cut over the rows of all ranks together.
    matrices = [n for n in one["count"].names if "q_proj" in n]
    assert all(int(m.kept(n).sum()) == keep_count(m.kept(n).size) for m in sharded.values() for n in matrices)
    build(tmp_path / "fsdp" / "recipe.yml", tmp_path / "built")


@pytest.mark.slow
def test_the_experts_of_a_mixture_are_learnt_in_shards(tmp_path: Path) -> None:
    made = make_experts(tmp_path / "kitchen", "mixtral", names=("count", "letters"))
    write_command(tmp_path / "run.py", MergeOptimizer, steps=2)
    command = f"train --recipe {open_recipe(made)} --steps 2 --teacher answers --eval-share 0 --batch-size 2 -o"
    sharded = [*ACCELERATE, *FSDP2, "--main_process_port", "29624", str(tmp_path / "run.py")]
    launch(*sharded, *command.split(), str(tmp_path / "out"))
    one = alone(made, teacher="answers", steps=2, eval_share=0.0)
    two = {n: Mask.load(tmp_path / "out" / f"{n}.mask") for n in one}
    assert any("experts" in n for n in one["count"].names)
    for expert, mask in one.items():  # of the last step: rounding sends some token to another expert of the mixture
        differ = sum(int((mask.kept(n) != two[expert].kept(n)).sum()) for n in mask.names)
        assert differ <= 0.005 * sum(mask.kept(n).size for n in mask.names)


def test_whole_tensors_have_all_their_rows() -> None:
    """Also one that is fused with others into a parameter of fewer rows."""
    tensor = torch.arange(20).view(10, 2)
    assert torch.equal(Shard(0, 4).rows(tensor), tensor)
    assert torch.equal(Shard(4, 7, "a group of ranks").rows(tensor), tensor[4:7])


def test_what_is_fused_is_refused_in_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "of", classmethod(lambda cls, p: cls(0, p.shape[0], "a group of ranks")))
    monkeypatch.setattr(Holders, "plain", lambda self, parameter: None)
    with pytest.raises(BadInput, match="not learnt in shards; launch without FSDP"):
        learn_merge(open_recipe(folder), tmp_path / "out", teacher="expert", steps=1)
    assert not (tmp_path / "out").exists()
