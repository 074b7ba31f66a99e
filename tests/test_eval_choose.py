"""`mftmerge choose`: the combination whose worst-served domain keeps most of its own mask's gain."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mftmerge import choose_combination
from mftmerge.cli import main
from mftmerge.combine import combine
from mftmerge.cut import drop_count
from mftmerge.data import tokenize
from mftmerge.errors import BadInput
from mftmerge.evaluate import candidates, choosing, files
from mftmerge.evaluate.candidates import Candidate
from mftmerge.evaluate.generation import Marker, Marks
from mftmerge.mask import Mask, MaskInfo

DOMAINS = ("math", "code")
FEW = ["union", "vote,threshold=2", "score@0.8,elect", "score@0.9,weights=1:2"]
TRIED = [f"--try={text}" for text in FEW]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def learnt(model: Any, rows: Sequence[Any], keep: float = 0.8) -> Mask:
    """A mask without training: it drops the weights whose absence lowers the loss of the rows, to first order."""
    ids = [torch.tensor([row["input_ids"]]) for row in rows]
    labels = [torch.tensor([row["labels"]]) for row in rows]
    model.zero_grad()
    for a, b in zip(ids, labels, strict=True):
        model(input_ids=a, labels=b).loss.backward()
    covered = {n: p for n, p in model.named_parameters() if "layers.1.mlp" in n}
    scores = {n: -(p * p.grad).detach().numpy() for n, p in covered.items()}
    kept = {}
    for name, values in scores.items():
        order = values.reshape(-1).argsort(kind="stable")
        kept[name] = np.ones(values.size, np.bool_)
        kept[name][order[: drop_count(values.size, keep)]] = False
        kept[name] = kept[name].reshape(values.shape)
    info = MaskInfo(keep=keep, training={"selection": "signed", "init_digest": "zeros"})
    return Mask.from_bools(kept, info, scores, {n: np.zeros_like(s) for n, s in scores.items()})


@pytest.fixture(scope="module")
def kitchen(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny model, rows of two domains, and a mask with scores for each."""
    here, path = tmp_path_factory.mktemp("choose"), tiny("llama", layers=2)
    rows = {
        "math": [{"prompt": f"{i} + {i}", "completion": f"it is\n#### {2 * i}"} for i in range(8)],
        "code": [{"prompt": f"f{i}", "completion": f"def f(x): return x * {i}"} for i in range(8)],
    }
    model, tokenizer = files.load_model(path, dtype="float32")
    tokens = {d: tokenize(rows[d], tokenizer, 64) for d in DOMAINS}
    masks = {d: learnt(model, tokens[d]) for d in DOMAINS}
    for domain in DOMAINS:
        (here / f"{domain}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[domain]))
        masks[domain].save(here / f"{domain}.mask")
        bare = Mask.from_bools({n: masks[domain].kept(n) for n in masks[domain].names}, MaskInfo(keep=0.8))
        bare.save(here / f"bare-{domain}.mask")
        upside = Mask.from_bools({n: ~masks[domain].kept(n) for n in masks[domain].names})
        upside.save(here / f"worse-{domain}.mask")
    paths = {d: here / f"{d}.mask" for d in DOMAINS}
    data = {d: here / f"{d}.jsonl" for d in DOMAINS}
    words = [paths["math"], paths["code"], "--model", path, "--data", data["math"], "--data", data["code"]]
    return SimpleNamespace(
        here=here, path=path, model=model, tokens=tokens, masks=masks, paths=paths, data=data, words=words
    )


def losses(kitchen: SimpleNamespace, mask: Mask | None) -> dict[str, float]:
    """Loss per answer token of each domain, from masked weights written by hand and the model's own loss."""
    kept = {} if mask is None else {n: torch.from_numpy(mask.kept(n)) for n in mask.names}
    weights = {n: p.detach() * kept[n] if n in kept else p.detach() for n, p in kitchen.model.named_parameters()}
    found = {}
    for domain, rows in kitchen.tokens.items():
        total = tokens = 0.0
        for row in rows:
            labels = torch.tensor([row["labels"]])
            inputs = {"input_ids": torch.tensor([row["input_ids"]]), "labels": labels}
            count = int((labels[0, 1:] != -100).sum())
            total += float(torch.func.functional_call(kitchen.model, weights, kwargs=inputs).loss) * count
            tokens += count
        found[domain] = total / tokens
    return found


def test_the_choice_is_the_one_whose_lowest_share_is_highest(kitchen: SimpleNamespace) -> None:
    masks = list(kitchen.masks.values())
    options: list[dict[str, Any]] = [{}, {"threshold": 2}, {"density": 0.8, "elect": True}]
    options += [{"density": 0.9, "weights": (1, 2)}]
    made = [combine(op, masks, **o) for op, o in zip(("union", "vote", "score", "score"), options, strict=True)]
    base, own = losses(kitchen, None), {d: losses(kitchen, kitchen.masks[d])[d] for d in DOMAINS}
    shares = [
        {d: (base[d] - found[d]) / (base[d] - own[d]) for d in DOMAINS}
        for found in (losses(kitchen, mask) for mask in made)
    ]
    lowest = [min(s.values()) for s in shares]
    assert len({round(x, 3) for x in lowest}) == len(FEW), "candidates that cannot be told apart"

    choice = choose_combination(kitchen.path, kitchen.paths, kitchen.data, candidates=FEW, dtype="float32")
    assert choice.judged == DOMAINS
    for text, expected in zip(FEW, shares, strict=True):
        for domain in DOMAINS:
            assert choice.share(text, domain)[0] == pytest.approx(expected[domain], abs=1e-3)
    assert choice.chosen == FEW[int(np.argmax(lowest))]
    assert choice.mask.digest == made[int(np.argmax(lowest))].digest
    assert choice.lowest(choice.chosen) == pytest.approx(max(lowest), abs=1e-3)


def test_the_command_writes_what_the_printed_command_makes(
    kitchen: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("choose", *kitchen.words, *TRIED, "-o", "general.mask", "--archive") == 0
    shown = capsys.readouterr().out
    assert "report the result on other rows" in " ".join(shown.split())
    assert "chosen" in shown.split("Share of the gain")[0]
    (line,) = (line for line in shown.splitlines() if "mftmerge combine" in line)
    program, *words = shlex.split(line)
    assert program == "mftmerge"
    assert words[-2:] == ["-o", "general.mask"]
    first = Mask.load("general.mask")
    assert run(*words[:-1], "again.mask") == 0
    again = Mask.load("again.mask")
    assert (first.digest, first.info) == (again.digest, again.info)
    weights = sum(map(first.size, first.names))
    assert max(Path(name).stat().st_size for name in ("general.mask", "again.mask")) < weights / 8  # archived
    assert [parent.name for parent in first.info.parents] == ["math.mask", "code.mask"]

    before = Path("general.mask").read_bytes()
    assert run("choose", *kitchen.words, *TRIED, "-o", "general.mask") == 2
    assert "exists" in capsys.readouterr().err
    assert Path("general.mask").read_bytes() == before
    assert run("choose", *kitchen.words, "--try", "union", "-o", "general.mask", "--overwrite") == 0
    assert Mask.load("general.mask").info.operation == "union"


def test_json_is_one_document_and_nothing_is_written_without_out(
    kitchen: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    masks = [f"code={kitchen.paths['code']}", f"math={kitchen.paths['math']}"]
    assert run("choose", *masks, *kitchen.words[2:], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    usual = ["union", "intersection", "vote@0.8"]
    usual += [f"score@{d}" for d in ("0.8", "0.84", "0.86", "0.88", "0.9", "0.8,elect", "0.86,elect")]
    assert list(found["table"]) == ["base", "code mask", "math mask", *usual]
    assert "vote is the same mask as union" in found["notes"]
    lowest = {name: found["table"][name]["lowest_share"] for name in usual}
    assert found["chosen"] == max(lowest, key=lambda name: lowest[name])
    for row in found["table"].values():
        assert row["lowest_share"] == min(cell["share"] for cell in row["domains"].values())
    assert found["table"]["code mask"]["domains"]["code"]["share"] == 1
    assert found["out"] is None
    assert found["command"].split()[2:4] == [str(kitchen.paths["code"]), str(kitchen.paths["math"])]


def test_without_scores_the_sets_are_tried_and_a_note_says_so(kitchen: SimpleNamespace) -> None:
    bare = {d: Mask.load(kitchen.here / f"bare-{d}.mask") for d in DOMAINS}
    tried, notes = candidates.defaults(bare)
    assert [c.text for c in tried] == ["union", "intersection", "vote", "vote@0.8"]
    assert len(notes) == 1
    assert "carries no scores" in notes[0]
    mixed = dict(kitchen.masks) | {"code": learnt(kitchen.model, kitchen.tokens["code"], keep=0.9)}
    assert [c.text for c in candidates.defaults(mixed)[0]][3:6] == ["vote@0.85", "score@0.85", "score@0.88"]


def test_a_domain_whose_own_mask_does_not_gain_does_not_count(kitchen: SimpleNamespace) -> None:
    masks = kitchen.masks | {"code": Mask.load(kitchen.here / "worse-code.mask")}
    made = {text: Candidate.parse(text).combine(list(masks.values()), DOMAINS) for text in ("intersection", "union")}
    choice = choosing.choose(kitchen.model, masks, kitchen.tokens, made)
    assert choice.judged == ("math",)
    assert choice.lowest(choice.chosen) == choice.share(choice.chosen, "math")[0]
    assert choice.notes[0].startswith("code does not count for the choice")
    row = choice.to_json()["table"][choice.chosen]["domains"]["code"]
    assert "share" not in row
    assert row["difference"] == choice.grid.difference(choice.chosen, "code").mean


def test_a_choice_that_is_worse_than_the_base_says_so(kitchen: SimpleNamespace) -> None:
    away = Candidate.parse("score@0.8,weights=-1:1").combine(list(kitchen.masks.values()), DOMAINS)
    choice = choosing.choose(kitchen.model, kitchen.masks, kitchen.tokens, {"away": away})
    assert choice.lowest("away") < 0
    assert [note.split(" (")[0] for note in choice.notes] == ["away is no better than the base on math"]


def test_where_no_mask_gains_there_is_nothing_to_keep(
    kitchen: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = [f"{d}={kitchen.here / f'worse-{d}.mask'}" for d in DOMAINS]
    assert run("choose", *masks, *kitchen.words[2:], "--try", "union", "-o", tmp_path / "new.mask") == 2
    error = capsys.readouterr().err
    assert "nothing to keep" in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_rows_that_the_template_refuses_are_skipped(kitchen: SimpleNamespace, tmp_path: Path) -> None:
    model = shutil.copytree(kitchen.path, tmp_path / "model")
    template = model / "chat_template.jinja"
    refuse = "{% if messages[0].content in ('f1', '2 + 2') %}{{ raise_exception('not so') }}{% endif %}"
    template.write_text(refuse + template.read_text())
    given = (model, kitchen.paths, kitchen.data)
    with pytest.raises(BadInput, match="the chat template refuses it: not so"):
        choose_combination(*given, candidates=["union"])
    for exact in ({}, {"math": "number"}):
        choice = choose_combination(*given, candidates=["union"], exact=exact, max_new_tokens=2, skip_bad_rows=True)
        assert {d: len(choice.grid.values("union", d, "loss")) for d in DOMAINS} == dict.fromkeys(DOMAINS, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--try", "score@x"], "candidate 'score@x': density 'x'"),
        (["--try", "score@1.5"], "out of range"),
        (["--try", "vote@"], "OP[@DENSITY][,OPTION=VALUE...]"),
        (["--try", ""], "OP[@DENSITY][,OPTION=VALUE...]"),
        (["--try", "vote,=2"], "cannot read '=2'"),
        (["--try", "vote,threshold=1,threshold=2"], "cannot read 'threshold=2'"),
        (["--try", "vote,density=0.9"], "the density stands after @"),
        (["--try", "best"], "choose from union"),
        (["--try", "vote,treshold=2"], "it takes threshold, weights"),
        (["--try", "score,weights=2;1"], "numbers between colons"),
        (["--try", "score,weights=1:1:1"], "3 weights for 2 masks"),
        (["--try", "complement"], "takes 1 mask"),
        (["--data", "sql={here}/math.jsonl"], "masks are for code, math, rows for code, math, sql"),
        (["--data", "{here}/math.jsonl"], "two are called 'math'"),
        (["{here}/bare-math.mask"], "give each mask the name of its rows"),
        (["--dtype", "int4"], "'int4' is not one of 'auto', 'float32'"),
        (["-o", "{here}/math.mask"], "exists"),
        (["-o", "{here}/nowhere/new.mask"], "no directory"),
    ],
)
def test_errors_are_one_line_and_come_before_the_work(
    kitchen: SimpleNamespace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(files, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    given = [a.format(here=kitchen.here) for a in arguments]
    assert run("choose", *kitchen.words, *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_mask_is_nothing_to_combine(kitchen: SimpleNamespace) -> None:
    with pytest.raises(BadInput, match="at least two"):
        choose_combination(kitchen.path, {"math": kitchen.paths["math"]}, {"math": kitchen.data["math"]})


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("vote,threshold=2", "--op vote --threshold=2"),
        ("vote@0.9,weights=2:0.5", "--op vote --density 0.9 --weights=2,0.5"),
        ("score@0.93,elect,allow-different-init=true", "--op score --density 0.93 --elect --allow-different-init"),
        ("score,elect=false,weights=-1:1", "--op score --weights=-1,1"),
        ("union,uncovered=keep", "--op union --uncovered=keep"),
    ],
)
def test_a_candidate_and_its_command_mean_the_same(
    kitchen: SimpleNamespace, text: str, command: str, tmp_path: Path
) -> None:
    candidate, out = Candidate.parse(text), str(tmp_path / "new.mask")
    paths = [str(path) for path in kitchen.paths.values()]
    written = candidate.command(paths, out)
    assert f" {command} -o " in written
    assert run(*shlex.split(written)[1:]) == 0
    made = candidate.combine(list(kitchen.masks.values()), ["math.mask", "code.mask"])
    assert (Mask.load(out).digest, Mask.load(out).info) == (made.digest, made.info)


class Drilled(Marker):
    """Says how many of 40 rows are right by the share of ones that the model's covered weights keep."""

    max_new_tokens = 1
    drafts: list[Any] = []  # noqa: RUF012

    def __init__(self, of: str, right: dict[int, int]) -> None:
        self.of, self.right = of, right

    def __call__(self, model: Any, journal: Any = None) -> Marks:
        zeros = int((model.get_parameter(self.of) == 0).sum())
        right = self.right.get(zeros, 0)
        return Marks({"exact": np.array([[i < right, 1.0] for i in range(40)], np.float64)}, ["x"] * 40)


def test_right_answers_choose_where_they_are_asked_for(kitchen: SimpleNamespace) -> None:
    """By loss intersection is the worse one here; by answers, which say the opposite, it is chosen."""
    made = {t: Candidate.parse(t).combine([*kitchen.masks.values()], ["a", "b"]) for t in ("union", "intersection")}
    name = kitchen.masks["math"].names[0]

    def zeros(mask: Mask) -> int:
        return int(mask.size(name) - mask.count(name))

    right = {0: 5, zeros(kitchen.masks["math"]): 25, zeros(made["union"]): 15, zeros(made["intersection"]): 30}
    scorers = {"math": Drilled(name, right)}
    by_loss = choosing.choose(kitchen.model, kitchen.masks, kitchen.tokens, made)
    choice = choosing.choose(kitchen.model, kitchen.masks, kitchen.tokens, made, scorers=scorers)
    assert by_loss.share("union", "math")[0] != pytest.approx(0.5)
    assert choice.share("union", "math")[0] == pytest.approx((15 - 5) / (25 - 5))
    assert choice.share("intersection", "math")[0] == pytest.approx((30 - 5) / (25 - 5))
    assert choice.share("union", "code") == by_loss.share("union", "code")
    cell = choice.to_json()["table"]["union"]["domains"]["math"]
    assert (cell["exact"], cell["difference"]) == (15 / 40, pytest.approx(10 / 40))
    with pytest.raises(BadInput, match="no such domain"):
        choose_combination(kitchen.path, kitchen.paths, kitchen.data, exact={"maths": "text"})
