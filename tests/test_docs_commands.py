"""What the pages in docs/ tell people to type: it runs on toy files, or the page says why no test runs it."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.experts import make_experts

from mftmerge.cli.main import COMMANDS, LazyGroup, main
from mftmerge.train.settings import RUN_KEYS, TrainSettings

ROOT = Path(__file__).parent.parent
PAGES = {p.name: p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"^(?:<!-- not run[^>]*: (?P<why>[^>]+) -->\n)?```sh\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def lines(code: str) -> list[str]:
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


RUN = {
    page: [c for b in BLOCK.finditer(text) if not b["why"] for c in lines(b["code"])] for page, text in PAGES.items()
}
LAUNCHED = [c for text in PAGES.values() for b in BLOCK.finditer(text) for c in lines(b["code"]) if "launch" in c]


def test_no_command_hides_in_a_block_of_another_kind() -> None:
    for page, text in PAGES.items():
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            assert language == "sh" or not re.search(r"^(mftmerge|accelerate) ", code, re.MULTILINE), page


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """The files that the pages take for granted, at toy size."""
    from mftmerge.checkpoint import Checkpoint
    from mftmerge.mask import Mask
    from mftmerge.quickstart.domains import write_domains

    here = tmp_path_factory.mktemp("docs")
    for name in ("M", "B", "fft", "PATH_OR_ID", "models/base"):
        shutil.copytree(tiny("llama"), here / name)
    for seed, name in enumerate(("models/math", "models/code"), 1):  # fine-tunes differ from their base
        shutil.copytree(tiny("llama", seed=seed), here / name)
    make_experts(here, names=("math", "sql"))
    shutil.copytree(tiny("llama", seed=1), here / "TUNED")
    (merge,) = re.findall(r"^```yaml\n(merge_method.*?)^```", PAGES["learning.md"], re.DOTALL | re.MULTILINE)
    (here / "merge.yml").write_text(merge)
    paths = write_domains(here / "data", {"train": 12, "test": 4}, longest=60)
    for domain, name in (("python", "code"), ("arithmetic", "math")):
        shutil.copy(paths[domain]["test"], here / f"{name}-test.jsonl")
    shutil.copy(paths["python"]["train"], here / "rows.jsonl")
    checkpoint, random = Checkpoint.open(here / "M"), np.random.default_rng(0)
    (here / "masks").mkdir()
    for name in ("general", "code", "math", "chat", "math-and-code", "masks/math", "masks/code", "masks/instruct"):
        kept = {n: random.random(checkpoint.entry(n).shape) < 0.9 for n in checkpoint.names if "3.mlp" in n}
        start = {n: np.zeros(k.shape, np.float32) for n, k in kept.items()} if name in ("code", "math") else None
        evidence = start and {n: random.normal(size=k.shape).astype(np.float32) for n, k in kept.items()}
        Mask.from_bools(kept, None, evidence, start).save(here / f"{name}.mask")
    (recipe,) = re.findall(r"^```yaml\n(merge_method.*?)^```", PAGES["recipes.md"], re.DOTALL | re.MULTILINE)
    (here / "recipe.yml").write_text(recipe)
    (here / "config.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {here / 'M'}}}]\n")
    shutil.copy(here / "config.yml", here / "mergekit_config.yml")
    return here


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, commands in RUN.items() if commands])
def test_commands(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = tmp_path / "work"
    shutil.copytree(workplace, here, symlinks=True)
    monkeypatch.chdir(here)
    for command in RUN[page]:
        program, *arguments = shlex.split(command, comments=True)
        if program == "pip":
            continue
        assert program == "mftmerge", command
        for output in ("OUT", "merged", "general.mask", "recipe.yml", "code.mask"):  # of the command before
            if arguments[-1] == output and (here / output).exists() and arguments[0] != "build":
                shutil.rmtree(here / output) if (here / output).is_dir() else (here / output).unlink()
        if arguments[0] == "train":
            arguments += ["--steps", "1"]
        with pytest.raises(SystemExit) as stopped:
            main([a for a in arguments if a != "--verify"])  # tests/test_recipe_export.py verifies
        assert stopped.value.code == 0, command


@pytest.mark.parametrize("command", LAUNCHED)
def test_launch_commands_have_options_that_exist(command: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    words = shlex.split(command)
    at = words.index("mftmerge")
    assert words[:2] == ["accelerate", "launch"]
    found = launch_command_parser().parse_args([*words[2:at], "mftmerge"])
    assert found.no_python
    assert found.num_processes >= 2
    assert found.multi_gpu or (found.use_fsdp and str(found.fsdp_version) == "2")
    assert_options(words[at + 1 :])


def test_commands_that_no_test_runs_have_options_that_exist() -> None:
    for text in PAGES.values():
        for block in BLOCK.finditer(text):
            for command in lines(block["code"]) if block["why"] else []:
                words = shlex.split(command, comments=True)
                if "mftmerge" in words:  # pip and curl have their own options
                    assert_options(words[words.index("mftmerge") + 1 :])


def assert_options(words: list[str]) -> None:
    """The command exists, and has the options in `words`."""
    group = LazyGroup(name="mftmerge")
    assert words[0] in COMMANDS
    known = {option for p in group.get_command(None, words[0]).params for option in p.opts}
    if "--plugin" in words:  # its operations bring options: test_extending.py runs these commands
        known |= {"--plugin", "--least"}
    assert {w for w in words[1:] if w.startswith("-")} <= known, words


def test_settings_files_for_large_models_are_settings(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGES["scale.md"], re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for text in blocks:
        (tmp_path / "settings.yaml").write_text(text)
        values = TrainSettings.load(tmp_path / "settings.yaml", RUN_KEYS)
        assert {"model", "data"} <= set(values) & set(RUN_KEYS)
        assert yaml.safe_load(text) == values


def test_the_reader_in_the_format_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mftmerge.mask import Mask

    kept = {"w": np.random.default_rng(0).random((13, 7)) < 0.5, "v": np.ones(3, bool)}
    Mask.from_bools(kept).save(tmp_path / "code.mask")
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGES["mask-format.md"], re.DOTALL | re.MULTILINE)
    names: dict[str, dict[str, np.ndarray]] = {}
    exec(compile(program, "mask-format.md", "exec"), names)
    for name, expected in kept.items():
        assert np.array_equal(names["kept"][name], expected)
