"""`mftmerge report`: what the page says, that nothing from a file becomes markup, and how a browser lays it out."""

from __future__ import annotations

import html
import json
import re
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mftmerge.cli import main
from mftmerge.combine import combine_files
from mftmerge.errors import BadInput
from mftmerge.evaluate.results import GridResult
from mftmerge.mask import Mask, MaskInfo
from mftmerge.report.page import Report, write_report

NAMES = [f"model.layers.{layer}.{module}.weight" for layer in (2, 3) for module in ("self_attn.q_proj", "mlp.up_proj")]
HISTORY = [[0, 2.5], [10, 2.25], [20, 2.125]]
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """A page as a browser reads it; fails where an element is closed that is not open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.parts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.parts.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += f"{data} "

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def row(self, *starts: str) -> str:
        """The one row of a table whose cells begin so, as text."""
        found = [r for r in self.rows if all(any(c.strip().startswith(s) for c in r) for s in starts)]
        assert len(found) == 1, (starts, found)
        return " | ".join(" ".join(c.split()) for c in found[0])


def trained(seed: int, base: str = "some/base", **training: Any) -> Mask:
    rng = np.random.default_rng(seed)
    kept = {name: rng.random((16, 20)) < (0.95 if "mlp" in name else 0.8) for name in NAMES}
    info: dict[str, Any] = {"steps": 20, "rows": 64, "best_step": 20, "gained": True, "validation": HISTORY, "lr": 1e-3}
    return Mask.from_bools(kept, MaskInfo(0.9, base, training=info | {"data": "0123456789abcdef" * 2} | training))


def results(code: Mask, extra: dict[str, Any] | None = None) -> GridResult:
    """Base, a mask that gains on one domain and loses on the other, and one that is not measured everywhere."""
    rng = np.random.default_rng(7)
    weights = np.full(40, 10.0)

    def values(shift: float) -> Any:
        return np.stack([20 + shift + rng.normal(0, 0.5, 40), weights], axis=1)

    cells = {("fft", d, "loss"): values(0) for d in ("code", "math")}
    cells |= {("code mask", "code", "loss"): values(-4), ("code mask", "math", "loss"): values(3)}
    cells |= {("other", "code", "loss"): values(0.01)}
    models = {"fft": {"mask": None}, "code mask": {"mask": code.digest, "density": code.density()}, "other": {}}
    domains = {d: {"rows": 40, "digest": d * 4} for d in ("code", "math")}
    return GridResult(models, domains, cells, "fft", {"numpy": "2.0"}, extra=extra or {})


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with two trained masks, their combination, a copy, a result, a part of it, and a sweep."""
    root = tmp_path / "work"
    (root / "masks").mkdir(parents=True)
    (root / "built").mkdir()
    code, math = trained(1), trained(2, lr=0.002)
    code.save(root / "masks/code.mask")
    code.save(root / "built/code.mask")
    math.save(root / "masks/math.mask")
    (root / "masks/code.mask.yaml").write_text("data: code.jsonl\nlr: null\nwarmup: 0.03\n")
    combine_files("vote", [root / "masks/code.mask", root / "masks/math.mask"], root / "both.mask", density=0.9)
    whole = results(code)
    whole.to_json(root / "results.json")
    part = GridResult({"fft": {}}, whole.domains, {k: v for k, v in whole.cells.items() if k[0] == "fft"}, "fft")
    part.to_json(root / "part.json")
    (root / "tokenizer.json").write_text(json.dumps({"models": 1}))
    lines: list[dict[str, Any]] = [{"kind": "sweep", "model": "some/base", "identity": "0"}]
    for seed, loss in ((0, 2.0), (1, 2.2)):
        run = {"kind": "run", "id": str(seed), "combination": {"lr": 0.5}, "seed": seed, "mask": f"masks/{seed}.mask"}
        lines.append(run | {"validation": {"base": 2.5, "mask": loss}})
    lines.append({"kind": "run", "id": "9", "combination": {"lr": 99}, "failed": "the loss is not finite"})
    lines.append({"kind": "choice", "combination": {"lr": 0.5}, "validation": {}})
    test = {"kind": "test", "row": "seed 0", "domain": "code", "loss": 1.75, "difference": -0.25}
    lines.append(test | {"standard_error": 0.0125, "verdict": "gain"})
    (root / "sweep").mkdir()
    (root / "sweep/results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"kind": "te')
    return root


def made(root: Path, **options: Any) -> tuple[Report, Page]:
    report = write_report(root, root.parent / "report.html", overwrite=True, **options)
    return report, Page(report.path.read_text(encoding="utf-8"))


def run(*arguments: str) -> int:
    """The command in this process; gives its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    return int(stopped.value.code or 0)


def test_the_page_needs_nothing_from_elsewhere_and_can_be_read_aloud(here: Path) -> None:
    _, page = made(here)
    assert page.source.startswith("<!DOCTYPE html>\n<html lang=")
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(tags)
    assert not re.search(r"url\(|@import|https?://", page.source)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert tags.count("table") == tags.count("caption") > 5
    assert all(a.get("scope") in ("row", "col", "colgroup") for t, a in page.elements if t == "th")
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    links = [a["href"] for t, a in page.elements if t == "a"]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(identities)
    assert {"masks", "gains", "sweeps", "density", "overlap", "family", "training", "settings"} <= set(identities)


def test_every_number_is_on_the_page(here: Path) -> None:
    report, page = made(here)
    masks = {m.name: m for m in report.found.masks}
    assert list(masks) == ["code", "math", "both"]
    assert (masks["code"].path, masks["code"].copies) == ("masks/code.mask", ("built/code.mask",))
    row = page.row("code", "trained, 20 steps")
    assert "some/ base" in row
    assert "code.jsonl, 64 rows" in row
    assert f"{masks['code'].found.total.density:.4f}" in row
    assert "vote of code, math (density 0.9)" in page.row("both", "vote of")
    for share in masks["code"].found.by_layer().values():
        assert f"{share.density:.4f}" in page.text
    for share in masks["math"].found.by_module().values():
        assert f"{share.density:.4f}" in page.text
    (comparison,) = report.compared
    for pair in comparison.pairs:
        line = page.row(f"{pair.a}, {pair.b}", f"{pair.total.jaccard:.4f}", f"{pair.total.agreement:.4f}")
        assert f"{pair.total.jaccard_independent:.4f}" in line
        assert ("one made from the other" in line) == (pair.b == "both")
    assert page.row("code", "2.5000", "2.1250", "−0.3750").endswith("gained")


def test_gains_with_errors_and_verdicts(here: Path) -> None:
    report, page = made(here)
    (only,) = report.found.results
    assert only.contained == ("part.json",)
    result = only.result
    row = page.row("code mask", f"{result.mean('code mask', 'code'):.4f}")
    for domain, word in (("code", "gain"), ("math", "worse")):
        d = result.difference("code mask", domain)
        shown = f"{d.mean:+.4f} ± {d.standard_error:.4f}".replace("-", "−")
        assert f"{result.mean('code mask', domain):.4f} | {shown} |" in row
        assert row.count(word) == 1
        assert shown in page.row("code", "trained, 20 steps"), "the mask's own line says what it gained"
    assert "not measured" in page.row("other", f"{result.mean('other', 'code'):.4f}")
    assert "1 gain" in page.text
    assert "1 worse" in page.text


def test_it_opens_with_what_the_combinations_keep(tmp_path: Path) -> None:
    rng, weights = np.random.default_rng(7), np.full(40, 10.0)
    gains = {"code": {"code": 4, "math": -1, "both": 3}, "math": {"code": 0, "math": 8, "both": 6}}
    noise = {d: rng.normal(0, 0.1, 40) for d in gains}
    cells = {("fft", d, "loss"): np.stack([20 + noise[d], weights], axis=1) for d in gains}
    models: dict[str, Any] = {"fft": {"mask": None}}
    for number, (row, operation) in enumerate((("code", None), ("math", None), ("both", "vote"), ("worse", "union"))):
        models[row] = {"mask": str(number), "density": 0.9, "operation": operation}
        for d in gains:
            shift = gains[d].get(row, -2)
            cells[row, d, "loss"] = np.stack([20 + noise[d] - shift + rng.normal(0, 0.1, 40), weights], axis=1)
    result = GridResult(models, {d: {"rows": 40, "digest": d} for d in gains}, cells, "fft")
    result.to_json(tmp_path / "results.json")
    _, page = made(tmp_path)
    first = page.source.index("<section")
    assert 'id="conclusion"' in page.source[first : page.source.index(">", first)]
    share = result.share("both", "code", "code")[0]
    assert f"both keeps {100 * share:.0f} % of code's" in page.text
    assert page.text.index("both keeps") < page.text.index("share of each own gain")
    row = page.row("both", f"{100 * share:.0f} %")
    assert "75 %" in row
    assert page.text.index("share of each own gain") < page.text.index("who helps and who harms whom")
    harm = result.difference("math", "code")
    (met,) = (r for r in page.rows if r[0] == "math " and "harms" in " ".join(r))
    assert f"{harm.mean:+.4f} ± {harm.standard_error:.4f}" in met[1]
    assert "its own" in met[2]
    assert any(r[0] == "code " and "could be chance" in " ".join(r) for r in page.rows)
    assert "as predicted" not in page.text
    result.extra = {"predicted by layer": {"both": {"code": {"0": 0.0125, "1": -0.5}, "math": {"1": 0.25}}}}
    result.to_json(tmp_path / "results.json", overwrite=True)
    page = made(tmp_path)[1]
    assert "what each layer of both costs, as predicted" in page.text
    assert "\u22120.5000" in page.row("code", "+0.0125")
    cells["code", "code", "loss"] = cells["fft", "code", "loss"]  # a mask that gains nothing has nothing to keep
    result.to_json(tmp_path / "results.json", overwrite=True)
    assert 'id="conclusion"' not in made(tmp_path)[1].source


def test_densities_that_are_equal_take_a_line_and_no_table(tmp_path: Path) -> None:
    even = Mask.from_bools({f"model.layers.{i}.mlp.up_proj.weight": np.arange(200) >= 20 for i in range(4)})
    even.save(tmp_path / "even.mask")
    _, page = made(tmp_path)
    assert "The same density in every matrix, within 0.001: even 0.9000" in page.text
    assert "Density by layer" not in page.text


def test_sweeps_and_settings(here: Path) -> None:
    _, page = made(here)
    assert page.row("lr 0.5", "2.1000").split(" | ")[1:] == ["2", "2.1000", "0.1414", "2.5000", "chosen"]
    assert "the loss is not finite" in page.row("lr 99", "failed")
    assert "−0.2500 ± 0.0125 | gain" in page.row("seed 0", "code")
    assert page.row("lr", "0.001").split(" | ") == ["lr", "0.001", "0.002"]
    assert page.row("warmup").split(" | ") == ["warmup", "0.03", ""]


def test_the_family_tree_goes_back_to_the_first_masks(here: Path) -> None:
    combine_files("complement", [here / "both.mask"], here / "rest.mask")
    report, page = made(here)
    start = page.source.index('id="family"')
    section = page.source[start : page.source.index("</section>", start)]
    tree = next(t for t in section.split('<ul class="tree">') if "<b>rest</b>" in t)
    order = [tree.index(word) for word in ("<b>complement</b>", ">both<", "<b>vote</b>", ">code<", ">math<")]
    assert order == sorted(order)
    number = [m.name for m in report.found.masks].index("code")
    assert f'<a href="#mask-{number}">code</a>' in tree


def test_what_files_say_never_becomes_markup(tmp_path: Path) -> None:
    root = tmp_path / "hostile"
    root.mkdir()
    name = HOSTILE.replace("/", "")
    mask = trained(1, base=f"{HOSTILE}\x00\u202e\ud800", init=HOSTILE, modules=HOSTILE, rows=HOSTILE)
    mask.save(root / f"{name}.mask")
    trained(2, base=HOSTILE * 100).save(root / "plain.mask")
    combine_files("vote", [root / f"{name}.mask", root / "plain.mask"], root / "both.mask", threshold=1)
    other = Mask.from_bools({f"{HOSTILE}.7.{HOSTILE}": np.eye(9, dtype=bool)}, MaskInfo(training={"imported": HOSTILE}))
    other.save(root / "other.mask")
    (root / f"{name}.mask.yaml").write_text(json.dumps({"data": HOSTILE, HOSTILE: HOSTILE}))
    whole = results(mask, {HOSTILE: HOSTILE, "lm_eval": {HOSTILE: {HOSTILE: {HOSTILE: 0.5}}}})
    renamed = {"fft": "fft", "other": HOSTILE, "code mask": "code mask"}
    whole.models = {renamed[k]: v | {"base": HOSTILE} for k, v in whole.models.items()}
    whole.cells = {(renamed[r], HOSTILE if d == "math" else d, m): v for (r, d, m), v in whole.cells.items()}
    whole.domains = {"code": {"rows": HOSTILE, "digest": HOSTILE}, HOSTILE: {"remarks": [HOSTILE]}}
    whole.versions = {HOSTILE: HOSTILE}
    whole.to_json(root / f"{name}.json")
    line = {"kind": "run", "id": "0", "combination": {HOSTILE: HOSTILE}, "failed": HOSTILE}
    (root / "results.jsonl").write_text(
        json.dumps({"kind": "sweep", HOSTILE: HOSTILE}) + "\n" + json.dumps(line) + "\n"
    )
    (root / f"broken {name}.mask").write_bytes(b"no mask")
    report, page = made(root)
    assert len(report.found.problems) == 1, report.found.problems
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "footer", "div"}
    allowed |= {
        "h1",
        "h2",
        "h3",
        "p",
        "a",
        "b",
        "i",
        "span",
        "code",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "details",
        "summary",
    }
    allowed |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "line", "circle", "polyline", "wbr"}
    assert {tag for tag, _ in page.elements} <= allowed
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on") or a == "src"]
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "\x00" not in page.source
    assert "\u202e" not in page.source


def test_a_broken_file_is_named_and_the_rest_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (here / "masks/math.mask").read_bytes()
    (here / "masks/math.mask").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(str(here), "-o", str(here / "page.html")) == 0
    said = capsys.readouterr()
    assert "masks/math.mask: tensor" in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert "2 masks" in said.out
    page = Page((here / "page.html").read_text(encoding="utf-8"))
    assert "1 thing is missing from this page" in page.text
    assert "masks/math.mask : tensor" in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"reference": "absent"},
        {"models": []},
        {"domains": {"code": 3}},
        {"extra": {"lm_eval": 5}},
        {"extra": {"predicted by layer": {"both": {"code": {"0": "much"}}}}},
        {"cells": [{"model": "fft", "domain": "code", "metric": "loss", "rows": [[float("nan"), 1]]}]},
        {"cells": [{"model": "other", "domain": "code", "metric": "loss", "rows": [[1, 1]]}]},
        {"domains": {"code": {"remarks": 4}, "math": {}}},
    ],
)
def test_results_that_make_no_sense_are_problems_of_the_page(here: Path, change: dict[str, Any]) -> None:
    whole = json.loads((here / "results.json").read_text())
    (here / "results.json").write_text(json.dumps(whole | change))
    report, page = made(here)
    assert [name for name, _ in report.found.problems] == ["results.json"]
    assert "results.json" in page.text
    assert "both" in page.text


def test_masks_of_two_models_are_compared_apart(here: Path) -> None:
    for seed in (3, 4):
        kept = {NAMES[0]: np.random.default_rng(seed).random((8, 8)) < 0.5}
        Mask.from_bools(kept).save(here / f"small{seed}.mask")
    report, _ = made(here)
    assert [c.names for c in report.compared] == [["code", "math", "both"], ["small3", "small4"]]
    assert not report.found.problems


@pytest.mark.parametrize("what", ["empty", "absent", "file", "broken"])
def test_nothing_to_report_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    target = tmp_path / what
    if what in ("empty", "broken"):
        target.mkdir()
    if what == "broken":
        (target / "x.mask").write_bytes(b"")
    if what == "file":
        target.write_text("")
    assert run(str(target)) == 2
    said = capsys.readouterr().err
    assert said.startswith("mftmerge: error: ")
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.html"))


def test_an_existing_page_is_replaced_only_when_asked(here: Path) -> None:
    (here / "report.html").write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        write_report(here)
    assert (here / "report.html").read_text() == "mine"
    write_report(here, overwrite=True)
    first = (here / "report.html").read_bytes()
    write_report(here, overwrite=True)
    assert (here / "report.html").read_bytes() == first, "the same files give the same page"
    for wrong in (here, here / "absent" / "page.html"):
        with pytest.raises(BadInput, match="directory"):
            write_report(here, wrong)
    assert not list(here.rglob("*.tmp*"))


def test_json_says_what_the_page_says_and_torch_stays_out(here: Path) -> None:
    code = (
        "import sys\nfrom mftmerge.cli import main\n"
        "try: main(['report', '.', '--json'])\n"
        "finally: print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    said = json.loads(done.stdout)
    assert said["report"] == "report.html"
    assert [m["name"] for m in said["masks"]] == ["code", "math", "both"]
    assert said["masks"][0]["density"] == pytest.approx(Mask.load(here / "masks/code.mask").density())
    assert [p["name"] for p in said["masks"][2]["parents"]] == ["code.mask", "math.mask"]
    verdicts = {(c["model"], c["domain"]): c["verdict"] for c in said["results"][0]["measured"]}
    assert verdicts["code mask", "code"] == "gain"
    assert verdicts["fft", "math"] == "reference"
    assert len(said["overlaps"][0]["pairs"]) == 3
    assert said["problems"] == []
    (here / "summary.json").write_text(done.stdout)
    assert write_report(here, overwrite=True).found.problems == [], "its own summary is no broken result"


def test_the_picture_of_the_readme_is_what_its_program_draws() -> None:
    docs = Path(__file__).parent.parent / "docs"
    drawn = runpy.run_path(str(docs / "picture.py"))["picture"]()
    assert drawn == (docs / "picture.svg").read_text(encoding="utf-8"), "run docs/picture.py"
    root = xml.etree.ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg")
    assert "url(" not in drawn


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1400, 400)  # a laptop and a telephone
MEASURE = """<script>
addEventListener("load", () => {
  const outside = [...document.body.querySelectorAll("*")].filter(e =>
    !e.parentElement.closest(".scroll, .trees > div") && e.getBoundingClientRect().right > innerWidth + 1);
  const narrow = [...document.querySelectorAll("td, th")].filter(e => e.textContent && e.clientWidth < 20);
  const drawn = [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().width > 50);
  parent.document.documentElement.dataset["w" + innerWidth] = JSON.stringify({
    page: document.documentElement.scrollWidth, outside: outside.map(e => e.tagName + "." + e.className),
    narrow: narrow.map(e => e.textContent), drawn: drawn.length,
  });
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_lays_it_out_without_overflow(here: Path, tmp_path: Path, dark: bool) -> None:
    """The page does not scroll sideways at either width; its drawings are there, and so are its colours."""
    from matplotlib.image import imread

    long = "a_very_long_name_without_any_place_to_break_it_" * 4
    (here / "both.mask").rename(here / f"{long}.mask")
    _, page = made(here)
    source = re.sub(r"<meta http-equiv[^>]*>", "", page.source)  # it would refuse the script that measures
    inner = html.escape(source.replace("</body>", f"{MEASURE}</body>"))
    frames = [f'<iframe style="width: {w}px; height: 1500px; border: 0" srcdoc="{inner}"></iframe>' for w in WIDTHS]
    probe, picture = tmp_path / "probe.html", tmp_path / "page.png"
    probe.write_text(f"<!DOCTYPE html><body>{''.join(frames)}</body>", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1840,1500", f"--screenshot={picture}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [str(CHROMIUM), *options, "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    for width in WIDTHS:
        measured = re.search(f'data-w{width}="([^"]*)"', done.stdout)
        assert measured, done.stderr[-2000:]
        found = json.loads(html.unescape(measured[1]))
        assert found["page"] <= width
        assert found["outside"] == []
        assert found["narrow"] == []
        assert found["drawn"] == page.source.count("<svg") > 0
    for left, right in ((8, 1408), (1420, 1810)):
        pixels = imread(picture)[8:, left:right, :3]
        assert (pixels.mean() < 0.35) == dark
        assert len(np.unique((pixels.reshape(-1, 3) * 15).astype(int), axis=0)) > 20, "text, lines and shades"
