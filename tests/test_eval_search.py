"""The search of `mftmerge choose`: its budget, that it goes on where it was, that predictions lead it, its command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import scaled

from mftmerge import choose_combination
from mftmerge.cli import main
from mftmerge.data import tokenize
from mftmerge.errors import BadInput
from mftmerge.evaluate import choosing, files, search
from mftmerge.evaluate.results import GridResult
from mftmerge.evaluate.searchsettings import SearchSettings
from mftmerge.mask import Mask, MaskInfo
from mftmerge.train.run import train_mask

DOMAINS = ("math", "code")
FEW = ["union", "score@0.9"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny model, rows of two domains and a trained mask for each."""
    pytest.importorskip("optuna")
    here, path = tmp_path_factory.mktemp("search"), tiny("llama", layers=2)
    rows = {
        "math": [{"prompt": f"{i} + {i}", "completion": f"it is {2 * i}"} for i in range(8)],
        "code": [{"prompt": f"f{i}", "completion": f"def f(x): return x * {i}"} for i in range(8)],
    }
    model, tokenizer = files.load_model(path, dtype="float32")
    options: dict[str, Any] = {
        "steps": 12,
        "batch_size": 8,
        "lr": 0.02,
        "scores": True,
        "eval_rows": 2,
        "layers": "0-1",
    }
    for domain in DOMAINS:
        (here / f"{domain}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[domain]))
        tokens = tokenize(rows[domain], tokenizer, 64)
        mask = train_mask(model, tokens, tokenizer=tokenizer, **options).mask
        mask.save(here / f"{domain}.mask")
        Mask.from_bools({n: mask.kept(n) for n in mask}, MaskInfo(keep=0.9)).save(here / f"bare-{domain}.mask")
    paths, data = {d: here / f"{d}.mask" for d in DOMAINS}, {d: here / f"{d}.jsonl" for d in DOMAINS}
    bare = {d: here / f"bare-{d}.mask" for d in DOMAINS}
    return SimpleNamespace(path=path, paths=paths, data=data, bare=bare)


def searched(trained: SimpleNamespace, out: Path | None = None, masks: Any = None, **options: Any) -> Any:
    settings = SearchSettings(**{"search": 5, "proposals": 10} | options)
    own = masks or trained.paths
    return choose_combination(
        trained.path, own, trained.data, out, candidates=FEW, dtype="float32", searching=settings, overwrite=True
    )


def test_a_search_measures_what_it_may_and_chooses_among_all(trained: SimpleNamespace, tmp_path: Path) -> None:
    plain = choose_combination(trained.path, trained.paths, trained.data, candidates=FEW, dtype="float32")
    found = searched(trained, tmp_path / "out.mask")
    assert len(found.candidates) == len(FEW) + 5
    assert len({m.digest for m in found.candidates.values()}) == len(found.candidates)
    lowest = {name: found.lowest(name) for name in found.candidates}
    assert found.chosen == max(lowest, key=lambda name: lowest[name])
    assert found.lowest(found.chosen) >= plain.lowest(plain.chosen) - 1e-6
    for name in FEW:
        assert found.lowest(name) == pytest.approx(plain.lowest(name), abs=1e-6)
    assert not (tmp_path / "out.mask.search").exists(), "the journal goes when the search is done"
    again = searched(trained)
    assert {n: m.digest for n, m in again.candidates.items()} == {n: m.digest for n, m in found.candidates.items()}


def test_what_is_found_is_a_command(trained: SimpleNamespace, tmp_path: Path) -> None:
    found = searched(trained, search=8)
    mine = [n for n in found.candidates if n not in FEW]
    by_layer = next(n for n in mine if ":" in n.split(",")[0])  # score@FIRST:LAST,...: a share of each layer too
    first, last = (layer.density for layer in found.candidates[by_layer].inspect().by_layer().values())
    shares = [float(d) for d in by_layer.split(",")[0].removeprefix("score@").split(":")]
    assert [first, last] == pytest.approx(shares, abs=2e-3)
    for name in (max(mine, key=found.lowest), by_layer):
        out = tmp_path / f"{mine.index(name)}.mask"
        command = choosing.Candidate.parse(name).command([str(p) for p in trained.paths.values()], str(out))
        assert run(*shlex.split(command)[1:], "--overwrite") == 0
        assert Mask.load(out).digest == found.candidates[name].digest


def test_a_search_that_was_stopped_goes_on_from_its_journal(
    trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = searched(trained, tmp_path / "whole.mask")
    real, measured = choosing.grids.row_losses, []

    def counted(*args: Any, **options: Any) -> Any:
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*args, **options)

    monkeypatch.setattr(choosing.grids, "row_losses", counted)
    usual = len(DOMAINS) * (1 + len(DOMAINS) + len(FEW))  # base, own masks, the list
    stop = usual + 5
    with pytest.raises(KeyboardInterrupt):
        searched(trained, tmp_path / "cut.mask")
    journal = tmp_path / "cut.mask.search"
    assert len(journal.read_text().splitlines()) == 1 + 2, "two combinations were measured whole"
    with journal.open("a") as f:
        f.write('{"mask": "cut o')  # by a crash
    measured.clear()
    stop = -1
    rest = searched(trained, tmp_path / "cut.mask")
    assert len(measured) == usual + 3 * len(DOMAINS)
    assert (rest.chosen, list(rest.candidates)) == (whole.chosen, list(whole.candidates))
    assert rest.lowest(rest.chosen) == whole.lowest(whole.chosen)


def test_the_journal_of_another_search_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    journal = tmp_path / "out.mask.search"
    for text in ('{"search": "0"}\n', "rows of something\n", ""):
        journal.write_text(text)
        with pytest.raises(BadInput, match="remove it"):
            searched(trained, tmp_path / "out.mask")
        assert journal.read_text() == text


def test_a_search_over_another_base_is_another_one(
    trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def journal(path: Path, identity: Any) -> None:
        seen.append(json.dumps(identity))
        raise KeyboardInterrupt

    monkeypatch.setattr(choosing, "SearchJournal", journal)
    for factor in (0.0, 0.0, 0.001):
        base = scaled(trained.path, tmp_path / "base", factor)
        with pytest.raises(KeyboardInterrupt):
            choose_combination(
                trained.path,
                trained.paths,
                trained.data,
                tmp_path / "out.mask",
                candidates=FEW,
                dtype="float32",
                base=str(base),
                searching=SearchSettings(search=1),
            )
    assert seen[0] == seen[1] != seen[2]


def test_without_scores_votes_are_searched(trained: SimpleNamespace) -> None:
    found = choose_combination(
        trained.path,
        trained.bare,
        trained.data,
        candidates=["union"],
        dtype="float32",
        searching=SearchSettings(search=3),
    )
    assert all(name.startswith("vote@") for name in list(found.candidates)[1:])
    assert not any("not guided" in note for note in found.notes), "predictions need no scores"


@pytest.mark.parametrize(("held", "groups"), [(2**30, [20]), (1, [1, 1, 1])])
def test_predictions_lead(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, held: int, groups: list[int]
) -> None:
    """The first one to be measured is what the predictions favour most; a low `HELD` is a proposal at a time."""
    monkeypatch.setattr(search, "HELD", held)
    seen: list[tuple[list[Mask], dict[str, Any]]] = []
    real = choosing.prediction.predict

    def watched(model: Any, masks: Any, rows: Any, proposals: list[Mask], **options: Any) -> Any:
        seen.append((proposals, real(model, masks, rows, proposals, **options)))
        return seen[-1][1]

    monkeypatch.setattr(choosing.prediction, "predict", watched)
    found = searched(trained, search=2, proposals=sum(groups))
    last, _ = seen.pop()
    assert [m.digest for m in last] == [found.mask.digest], "its layers"
    assert [len(group) for group, _ in seen] == groups
    proposals = [mask for group, _ in seen for mask in group]
    lowest = [share for _, said in seen for share in np.min([o.shares for o in said.values()], axis=0)]
    best = proposals[int(np.argmax(lowest))]
    assert found.candidates[list(found.candidates)[len(FEW)]].digest == best.digest


def test_the_command_line_searches(
    trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *trained.paths.values(),
        "--model",
        trained.path,
        "--data",
        trained.data["math"],
        "--data",
        trained.data["code"],
    ]
    options = ["--try", "union", "--search", 2, "--proposals", 5, "--dtype", "float32"]
    assert run("choose", *words, *options, "-o", tmp_path / "x.mask", "--results", tmp_path / "all.json", "--json") == 0
    (row,) = GridResult.from_json(tmp_path / "all.json").extra["predicted by layer"]
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == row
    assert len(found["table"]) == 1 + len(DOMAINS) + 1 + 2
    assert any("the search measured 2" in note for note in found["notes"])
    assert {d: list(layers) for d, layers in found["predicted_by_layer"].items()} == {d: ["0", "1"] for d in DOMAINS}
    assert sum("layer 0 " in note for note in found["notes"]) == len(DOMAINS)
    assert torch.is_grad_enabled()
