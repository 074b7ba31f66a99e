"""Every command with missing, wrong and hostile arguments: one line, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import INPUTS, SLOT, WORKING, broken, command_line, make_inputs

from mftmerge.cli import main
from mftmerge.cli.main import COMMANDS
from mftmerge.errors import BadInput
from mftmerge.evaluate.searchsettings import SearchSettings
from mftmerge.learn.rebasesettings import RebaseSettings
from mftmerge.learn.settings import LearnSettings
from mftmerge.quickstart.plan import Plan
from mftmerge.recipe.settings import BuildSettings
from mftmerge.settings import parsed
from mftmerge.sweepplan import SweepPlan
from mftmerge.train.settings import TrainSettings

Refused = Callable[..., str]


class Inputs:
    """Sound and broken ones, and an empty directory for outputs; of its own, since all of it is compared."""

    def __init__(self, here: Path, tiny: Callable[..., Path]) -> None:
        self.here = make_inputs(here, tiny)
        self.broken = broken(here / "broken")
        self.place = here / "place"
        self.place.mkdir()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("errors"), tiny)


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory below, with size and modification time of the files."""
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        found[str(path)] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def refused(inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs the program in an empty directory and checks how it refuses; gives what it said."""
    monkeypatch.chdir(inputs.place)

    def run(arguments: list[str], codes: tuple[int, ...] = (2,)) -> str:
        before = snapshot(inputs.here)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        out, error = capfd.readouterr()
        left = snapshot(inputs.here)
        for path in inputs.place.iterdir():  # so that the next case starts afresh
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        called = shlex.join(arguments)[:500]
        assert error.startswith("mftmerge: error: "), (called, error)
        assert error.count("\n") == 1, (called, error)
        assert error[:-1].isprintable(), (called, error)
        assert "Traceback" not in error, (called, error)
        assert "unexpected" not in error, (called, error)
        assert len(error) < 2500, called
        assert stop.value.code in codes, (called, error)
        assert out == "", called
        assert left == before, (called, error)
        return error

    return run


def test_every_command_has_a_line_that_works() -> None:
    assert set(WORKING) == set(COMMANDS)


@pytest.mark.parametrize("command", WORKING)
def test_options_that_are_not_there(refused: Refused, command: str) -> None:
    assert "--no-such-option" in refused([command, "--no-such-option"])
    assert refused([command, "--no-such-option\n\x1b[31m"])
    if command != "quickstart":  # it needs nothing
        refused([command])


SLOTS = [(command, m[1], m[2]) for command, line in WORKING.items() for m in SLOT.finditer(line) if m[2] in INPUTS]
# What only the weights are read of, a mask is about; and settings may all be the usual ones.
WEIGHTS_ALONE = {"no config", "config of an unknown kind", "no tokenizer", "size that is text"}
WEIGHTS_ALONE |= {"heads that do not divide"}
UNREAD = WEIGHTS_ALONE | {"config that is no JSON", "config that is a list", "config that is a link to itself"}
ACCEPTED = {
    "apply": WEIGHTS_ALONE,
    **dict.fromkeys(("import", "diff-mask", "patch", "patch-apply"), UNREAD),
    "train": {"empty"},
}


@pytest.mark.parametrize(("command", "slot", "kind"), SLOTS)
def test_broken_inputs(inputs: Inputs, refused: Refused, command: str, slot: str, kind: str) -> None:
    """A broken file in the place of each input in turn, the others sound."""
    codes = (1, 2) if command == "mergekit-yaml" else (2,)  # mergekit's own errors are failures of its own
    for what, path in inputs.broken[kind].items():
        if what in ACCEPTED.get(command, ()) and not (what == "empty" and kind != "settings"):
            continue
        error = refused(command_line(command, inputs.here, inputs.place, **{slot: path}), codes)
        if path.startswith(str(inputs.here)) and command != "mergekit-yaml":
            assert Path(path).name in error, (what, error)


# Options added to a line that works, cases apart by |.
VALUES = {
    "train": """
        --steps -1 | --steps x | --keep 0 | --keep 1.5 | --keep nan | --lr inf | --lr -1 | --lr nan | --lr 0 |
        --batch-size 0 | --batch-size -3 | --max-length 1 | --warmup 1 | --warmup nan | --seed -1 | --seed 4294967296 |
        --eval-share 1 | --layers 9 | --layers x | --layers 1-0 | --layers 0-99999999999 | --modules ( |
        --modules nothing |
        --pattern 0:4 | --pattern x | --pattern 1:99999999 | --weights x | --weights 1,2 | --weights nan |
        --init x | --scope x | --dtype int4 | --prefix x | --adam-bits 7 | --log-to nothing | --target x |
        --target delta | --clip 0 | --clip nan | --accumulate 0 | --patience 0 | --eval-every 0 | --eval-rows 0
        | --save-every -1 | --keep-warmup 5 | --start absent.mask | --base absent/model/path | --eval-data
        absent.jsonl
    """,
    "combine": """
        --op nothing | --threshold 0 | --threshold -1 | --threshold nan | --threshold x | --threshold 1.5 |
        --weights 1 | --weights 1,2,3 | --weights nan,1 | --weights inf,1 | --weights 0,1 | --weights -1,1 |
        --weights x | --weights , | --density 2 | --density -1 | --density nan | --density x | --density inf |
        --density 1/0 | --uncovered maybe | --op complement | --op score | --op union --threshold 2 | --op xor
        --weights 1,1 | --set x | --set nothing=1 | --set =
    """,
    "apply": "--base absent/model/path | --base ./one\ntwo",
    "build": "--seed x | --seed -1 | --seed 4294967296 | --device \x1b[31mnothing | --device xpu | --device mps",
    "export": "--verify=maybe",
    "eval": """
        --limit 0 | --limit -1 | --limit x | --max-length 1 | --bootstrap -1 | --dtype x | --device nothing |
        --reference nothing | --exact x | --exact nothing=text | --exact rows=nothing | --exact rows=re:( |
        --batch-tokens 0 | --max-new-tokens 0 | --lm-eval-limit 0 | --out nowhere/x.json | --markdown
        nowhere/x.md | --plot nowhere/x.png | --plot x.nothing | --plot p.png --markdown ./p.png | --out . |
        --mask absent.mask | --data absent.jsonl
    """,
    "diff-mask": """
        --keep 2 | --keep nan | --keep x | --keep -1 | --method nothing | --method tall | --lambda nan --method
        tall | --lambda x | --only ( | --only nothing | --others absent/model/path | --merged x
    """,
    "chat": "--max-new-tokens 0 | --dtype x | --device nothing | --mask absent.mask | --mask base=absent.mask",
    "push": "--dry-run=maybe",
    "quickstart": "--seed x | --seed 4294967296 | --tiny --model m",
    "inspect": "--plot nowhere/x.png | --plot x.nothing",
    "compare": "--plot nowhere/x.png | --plot x.nothing | --plot x.png --conflict-plot x.png",
    "choose": """
        --limit 0 | --search-seed -1 | --dtype x | --device nothing | --try nothing | --try vote@2 | --data c=c.jsonl
    """,
    "sweep": "--markdown nowhere/x.md | --markdown .",
}


@pytest.mark.parametrize("command", VALUES)
def test_values_out_of_range(inputs: Inputs, refused: Refused, command: str) -> None:
    good = command_line(command, inputs.here, inputs.place)
    for case in VALUES[command].split("|"):
        words = [w for w in re.split(r" +|\n {4,}", case) if w]
        refused([*good, *words])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_every_seed_is_one_that_numpy_takes(seed: int) -> None:
    """What numpy, and mergekit, accelerate and optuna with it, would refuse when all is loaded."""
    for settings, name in {
        TrainSettings: "seed",
        LearnSettings: "seed",
        RebaseSettings: "seed",
        BuildSettings: "seed",
        SearchSettings: "search_seed",
    }.items():
        assert parsed(settings.model_fields[name], str(2**32 - 1), ",", "--seed") == 2**32 - 1
        with pytest.raises(BadInput, match=rf"seed[ =]{seed}: Input should be "):
            parsed(settings.model_fields[name], str(seed), ",", "--seed")
        with pytest.raises(BadInput, match=rf"^{name}: Input should be "):
            settings.make({name: seed})
    with pytest.raises(BadInput, match=rf"seed[ =]{seed}: Input should be"):
        Plan(seed=seed)
    plan = {"model": "m", "train": "a", "validation": "b", "test": {"c": "c"}, "seeds": [0, seed]}
    with pytest.raises(BadInput, match=r"^seeds\.1: Input should be"):
        SweepPlan.make(plan)


OUTPUTS = [(command, m[1]) for command, line in WORKING.items() for m in SLOT.finditer(line) if m[2] == "out"]


@pytest.mark.parametrize(("command", "slot"), OUTPUTS)
def test_places_that_cannot_be_written(inputs: Inputs, refused: Refused, command: str, slot: str) -> None:
    """A file in the place of a directory stops root too, whom permissions do not."""
    file = inputs.here / "rows.jsonl"
    places = [file / slot, file / "below" / slot, Path("/proc/mftmerge") / slot, "./" + "x" * 5000, "./a\0b"]
    if "." in slot:
        places += [inputs.here / "nowhere" / slot, inputs.here / "model", "."]
    else:
        places += [file]
    for place in places:
        refused(command_line(command, inputs.here, inputs.place, **{slot: str(place)}), (1, 2))


@pytest.mark.parametrize(("command", "slot"), [o for o in OUTPUTS if o[0] not in ("mergekit-yaml", "sweep", "run")])
def test_outputs_that_are_there_stay(inputs: Inputs, refused: Refused, command: str, slot: str) -> None:
    existing = inputs.here / ("b.mask" if slot.endswith(".mask") else "train.yml" if "." in slot else "tuned")
    assert existing.name in refused(command_line(command, inputs.here, inputs.place, **{slot: str(existing)}))


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_picture_that_is_there_stays(inputs: Inputs, refused: Refused, command: str) -> None:
    picture = inputs.here / "there.png"
    picture.write_bytes(b"mine")
    good = command_line(command, inputs.here, inputs.place)
    assert "--overwrite" in refused([*good, "--plot", str(picture)])
    assert picture.read_bytes() == b"mine"
    with pytest.raises(SystemExit) as ended:
        main([*good, "--plot", str(picture), "--overwrite"])
    assert ended.value.code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("command", "slot"), [o for o in OUTPUTS if "." in o[1]])
def test_a_pipe_or_device_is_not_replaced(inputs: Inputs, refused: Refused, command: str, slot: str) -> None:
    pipe = inputs.here / f"pipe-{slot}"
    os.mkfifo(pipe)
    for more in ([], ["--overwrite"]):
        line = [*command_line(command, inputs.here, inputs.place, **{slot: str(pipe)}), *more]
        assert pipe.name in refused(line)
    assert pipe.is_fifo()
    pipe.unlink()


@pytest.mark.parametrize("command", ["apply", "build", "export"])
def test_a_model_is_not_replaced_by_what_is_made_of_it(inputs: Inputs, refused: Refused, command: str) -> None:
    line = command_line(command, inputs.here, inputs.place, new=str(inputs.here / "model"))
    refused([*line, "--overwrite"])
