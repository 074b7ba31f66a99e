"""One merge: bit for bit stock mergekit's results, with any number of threads, tensor by tensor."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.tiny_models import tiny_checkpoint
from recipe_kitchen import assert_equal, make_kitchen, stock, tensors

from mftmerge.apply import apply_mask
from mftmerge.checkpoint import Checkpoint
from mftmerge.checkpointwriter import CheckpointWriter
from mftmerge.errors import MftmergeError
from mftmerge.recipe import evaluation, merge, settings
from mftmerge.recipe.build import build
from mftmerge.recipe.catalogue import AT_DENSITY_1, BY_ELEMENT
from mftmerge.recipe.load import load_recipe
from mftmerge.recipe.settings import BuildSettings


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def kitchen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kitchen(tmp_path_factory.mktemp(request.param), dtype=request.param)


def recipes(models: Path) -> dict[str, dict[str, object]]:
    def inputs(**parameters: object) -> list[dict[str, object]]:
        return [{"model": str(models / n), "parameters": parameters} for n in ("math", "code", "instruct")]

    base = {"base_model": str(models / "base")}
    gradient = [{"filter": "mlp", "value": [0.1, 0.9, 0.4]}, {"value": 0.37}]
    return {
        "linear": {"merge_method": "linear", "models": inputs(weight=gradient)},
        "sum": {"merge_method": "linear", "models": inputs(weight=0.3), "parameters": {"normalize": False}},
        "linear with base": {
            **{"merge_method": "linear", "models": inputs(weight=0.3), "parameters": {"weight": 2}, **base},
        },
        "task": {"merge_method": "task_arithmetic", "models": inputs(weight=gradient), **base},
        "task mean": {
            **{"merge_method": "task_arithmetic", "models": inputs(weight=0.7), **base},
            "parameters": {"normalize": True, "lambda": 0.8},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        },
        "ties": {"merge_method": "ties", "models": inputs(weight=gradient, density=[0.2, 0.7]), **base},
        "ties int8": {
            **{"merge_method": "ties", "models": inputs(weight=0.5, density=0.33), **base},
            "parameters": {"int8_mask": True, "normalize": "false", "lambda": "1.5e0"},
            "dtype": "float16",
        },
        "ties edge": {"merge_method": "ties", "models": inputs(weight=1, density=[0, 1, 1e-9]), **base},
        "slerp": {
            **{"merge_method": "slerp", "models": inputs()[:2], "parameters": {"t": [0.1, 0.6]}, "dtype": "float32"},
            "base_model": str(models / "math"),
        },
        "dare": {"merge_method": "dare_ties", "models": inputs(weight=0.5, density=0.6), **base},
        "della": {"merge_method": "della", "models": inputs(weight=0.5, density=0.6, epsilon=0.1), **base},
        "dare without scale": {
            **{"merge_method": "dare_ties", "models": inputs(weight=0.5, density=0.4), **base},
            **{"parameters": {"rescale": False, "normalize": True}, "dtype": "float16"},
        },
        "dare of nothing": {"merge_method": "dare_linear", "models": inputs(weight=0.5, density=0), **base},
        "della of some": {
            "merge_method": "della_linear",
            "models": [
                {"model": str(models / name), "parameters": {"weight": 0.4, "density": density, "epsilon": 0.1}}
                for name, density in (("math", 0), ("code", 0.6), ("instruct", 1))
            ],
            **{"parameters": {"int8_mask": True, "lambda": 0.9}, "dtype": "float32", **base},
        },
        "dare at some": {"merge_method": "dare_linear", "models": inputs(weight=0.5, density=[1, 0.3, 1]), **base},
        "nearswap": {
            **{"merge_method": "nearswap", "models": inputs()[:2], "parameters": {"t": 0.01}},
            "base_model": str(models / "math"),
        },
        "fusion": {"merge_method": "arcee_fusion", "models": inputs()[:1], **base},  # gives float32 whatever it gets
        "stock": {"merge_method": "model_stock", "models": inputs(), **base},
        "karcher": {"merge_method": "karcher", "models": inputs()},
        "sce": {"merge_method": "sce", "models": inputs(), "parameters": {"select_topk": 0.2}, **base},
        "copy": {"merge_method": "passthrough", "models": [{"model": str(models / "math")}], "out_dtype": "float16"},
    }


NAMES = list(recipes(Path(".")))


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tensors are merged at a time. Torch itself always has one thread: its sums depend on how many it has."""
    count = int(request.param)
    monkeypatch.setattr(evaluation, "PIECE", 1024)  # pieces end within rows
    monkeypatch.setattr(settings, "cores", lambda: count)
    return count


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", NAMES)
def test_bit_equal_to_mergekit(name: str, kitchen: Path, tmp_path: Path) -> None:
    config = recipes(kitchen / "models")[name]
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(config))
    build(path, tmp_path / "ours", seed=5)
    theirs = kitchen / "stock" / name  # the same for any number of threads
    if not theirs.exists():
        stock(config, theirs)
    assert_equal(tensors(tmp_path / "ours"), tensors(theirs))
    for file in ("config.json", "tokenizer.json"):
        a, b = ((side / file).read_text() for side in (tmp_path / "ours", theirs))
        assert json.loads(a) == json.loads(b)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "ram"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.usefixtures("threads")
def test_any_number_of_models(count: int, method: str, tmp_path: Path, kitchen: Path) -> None:
    """Sums over the models do not depend on how a tensor is cut into pieces."""
    base, rng = Checkpoint.open(kitchen / "models/math"), np.random.default_rng(count)
    for i in range(count):
        folder = tmp_path / f"m{i}"
        shutil.copytree(base.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        with CheckpointWriter(folder, base.names) as writer:
            for entry in base:
                values = (rng.standard_normal(entry.size, np.float32) * 0.1).view(np.uint32)
                raw = values if entry.dtype == "F32" else (values >> 16).astype(np.uint16)
                writer.add(entry.name, entry.dtype, entry.shape, raw.view(np.uint8).data)
    inputs = [{"model": str(tmp_path / f"m{i}"), "parameters": {"weight": 0.1 + 0.2 * i}} for i in range(count)]
    config = {"merge_method": method, "models": inputs, "parameters": {"normalize": True}}
    if method == "ram":
        config = {"merge_method": method, "models": [{"model": i["model"]} for i in inputs]}
    config |= {} if method == "linear" else {"base_model": str(kitchen / "models/base")}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(config))
    build(tmp_path / "r.yml", tmp_path / "ours")
    assert_equal(tensors(tmp_path / "ours"), tensors(stock(config, tmp_path / "theirs")))


MIXTURES = [  # of the base and two models; promoted together they are float32, of some a narrower dtype is common
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "float32", "bfloat16"),
    ("float16", "float16", "bfloat16"),
    ("bfloat16", "float16", "bfloat16"),
    ("float32", "bfloat16", "float16"),
]


@pytest.fixture(scope="module")
def models_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, each in three dtypes."""
    folder = tmp_path_factory.mktemp("dtypes")
    for dtype, (seed, name) in itertools.product(("bfloat16", "float16", "float32"), enumerate("abc")):
        tiny_checkpoint(folder / dtype / name, dtype=dtype, seed=seed, layers=1)
    return folder


@pytest.mark.parametrize("mixture", MIXTURES, ids="-".join)
@pytest.mark.parametrize(
    "method", [*AT_DENSITY_1, *(m for m in BY_ELEMENT if m not in ("passthrough", "nearswap")), "slerp", "nearswap"]
)
def test_inputs_of_several_dtypes(
    method: str, mixture: tuple[str, ...], models_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `dtype:` all inputs of a tensor are promoted together, also where they are sorted or drawn one by one."""
    monkeypatch.setattr(evaluation, "PIECE", 1024)
    base, *others = (str(models_in / dtype / name) for dtype, name in zip(mixture, "abc", strict=True))
    each: dict[str, object] = {"weight": 0.6, "density": 0.7} if method in AT_DENSITY_1 else {}
    each |= {"epsilon": 0.1} if method.startswith("della") else {}
    each |= {"weight": 0.4} if method in ("linear", "task_arithmetic") else {}
    models = [{"model": m, "parameters": each} for m in (others[1:] if method in ("slerp", "nearswap") else others)]
    config = {"merge_method": method, "models": models}
    config |= {} if method == "linear" else {"base_model": base}
    config |= {"parameters": {"t": 0.3}} if method in ("slerp", "nearswap") else {}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(config))
    build(tmp_path / "r.yml", tmp_path / "ours", seed=5, num_threads=2)
    assert_equal(tensors(tmp_path / "ours"), tensors(stock(config, tmp_path / "theirs")))


@pytest.mark.usefixtures("threads")
def test_masks_on_inputs_and_output(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as mergekit over checkpoints that were masked beforehand, masked again afterwards."""
    monkeypatch.chdir(kitchen)
    kinds = itertools.product(("weights", "delta"), ("weights", "delta"))
    base = apply_mask("masks/instruct.mask", "models/base", tmp_path / "base").out
    for i, (own, result) in enumerate(kinds):
        path, here = tmp_path / f"{i}.yml", tmp_path / str(i)
        path.write_text(f"""
            merge_method: ties
            base_model: {{model: models/base, mask: masks/instruct.mask}}
            models:
              - model: models/math
                mask: {{file: masks/math.mask, on: {own}}}
                parameters: {{weight: 1, density: 0.6}}
              - {{model: models/code, parameters: {{weight: 0.5}}}}
            mask: {{file: masks/code.mask, on: {result}}}
        """)
        build(path, here / "ours")
        masked = apply_mask("masks/math.mask", "models/math", here / "math", base=base if own == "delta" else None).out
        config = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [
                {"model": str(masked), "parameters": {"weight": 1, "density": 0.6}},
                {"model": str(kitchen / "models/code"), "parameters": {"weight": 0.5}},
            ],
        }
        merged = stock(config, here / "merged")
        apply_mask("masks/code.mask", merged, here / "theirs", base=base if result == "delta" else None)
        assert_equal(tensors(here / "ours"), tensors(here / "theirs"))


def test_shards_and_index(kitchen: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipes(kitchen / "models")["copy"]))
    recipe = load_recipe(tmp_path / "r.yml")
    for name, size in (("many", "100K"), ("one", "1000B")):
        (tmp_path / f"{name}-work").mkdir()
        work = tmp_path / f"{name}-work"
        merge.merge(
            recipe.documents[0],
            recipe.masks(recipe.documents[0]),
            tmp_path / name,
            work,
            recipe.tensors(recipe.documents[0]),
            settings=BuildSettings(out_shard_size=size),
        )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_equal(tensors(tmp_path / "many"), tensors(tmp_path / "one"))


def test_files_do_not_depend_on_threads(kitchen: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipes(kitchen / "models")["task"]))
    for count in (1, 4):
        build(tmp_path / "r.yml", tmp_path / str(count), num_threads=count)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("1", "4"))
    assert a == b


def test_mergekit_is_left_as_it_was(kitchen: Path, tmp_path: Path) -> None:
    """Nothing of it is replaced, and what it remembers of models for the life of the process is not ours."""
    from mergekit import merge as theirs
    from mergekit.io.tasks import LoaderCache

    before = theirs.Executor, dict(LoaderCache.loaders)
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipes(kitchen / "models")["linear"]))
    build(tmp_path / "r.yml", tmp_path / "out")
    assert (theirs.Executor, dict(LoaderCache.loaders)) == before
    assert "loaders" not in vars(LoaderCache())


@pytest.mark.usefixtures("threads")
def test_a_failure_in_the_middle_ends_the_merge(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def fails(self: object, job: object, write: object) -> int:
        if next(calls) == 5:
            raise ValueError("in the\nmiddle")
        return 0

    monkeypatch.setattr(merge.Evaluation, "save", fails)
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipes(kitchen / "models")["linear"]))
    with pytest.raises(MftmergeError, match="mergekit: in the middle"):
        build(tmp_path / "r.yml", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yml"]


def test_no_more_tensors_at_a_time_than_the_largest_has_room_for() -> None:
    room, inside, most = evaluation.Room(100), [], []

    def work(size: int) -> None:
        with room.taken(size):
            inside.append(size)
            most.append(sum(inside))
            time.sleep(0.01)
            inside.remove(size)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [60, 60, 40, 120, 30, 30, 30, 30, 10]))
    assert max(most) == 120, "one that is larger than all room goes alone"
    assert sorted(most)[-2] <= 100


def test_numbers_that_were_counted_wrongly_are_no_silent_difference(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "draws", lambda task, size: size)  # of two models
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipes(kitchen / "models")["dare"]))
    with pytest.raises(MftmergeError, match="other random numbers"):
        build(tmp_path / "r.yml", tmp_path / "out", num_threads=2)
    assert not (tmp_path / "out").exists()


def test_a_method_that_draws_from_large_tensors_draws_as_mergekit(tmp_path: Path) -> None:
    """arcee_fusion looks at a million random weights of a tensor that is larger."""
    for i, name in enumerate(("base", "math")):
        tiny_checkpoint(tmp_path / name, dtype="bfloat16", seed=i, hidden=1024, layers=1)
    assert max(e.size for e in Checkpoint.open(tmp_path / "base")) > 1_000_000
    config = {"merge_method": "arcee_fusion", "base_model": str(tmp_path / "base")}
    config["models"] = [{"model": str(tmp_path / "math")}]
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(config))
    build(path, tmp_path / "ours", seed=5, num_threads=3)
    assert_equal(tensors(tmp_path / "ours"), tensors(stock(config, tmp_path / "theirs")))
