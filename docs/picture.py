"""The picture at the top of the README: `python docs/picture.py` writes docs/picture.svg.

Its masks are masks: the third one is combined by the program from the other two.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mftmerge.combine import combine
from mftmerge.mask import Mask

SIDE, CELL, GAP = 7, 11, 2  # a matrix of SIDE x SIDE weights, in units of the picture
STEP, SIZE = CELL + GAP, SIDE * (CELL + GAP) - GAP
WIDTH, HEIGHT = 840, 284
COLUMNS = (66, 274, 482, 690)  # left edges of: base, the two masks, their combination, the model
UPPER, MIDDLE, LOWER = 22, 98, 156  # upper edges of the matrices
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1a1f26 }
  .paper { fill: #ffffff; stroke: #d5dae0 } .soft { fill: #59636f; font-size: 12.5px }
  .verb { font-weight: 600; fill: #59636f } .name { font-weight: 600 }
  .w { fill: #59636f } .code { fill: #2f7fd6 } .math { fill: #d9722f } .both { fill: #7a5bc4 }
  .out { fill: none; stroke: #b4bcc6; stroke-width: 1 }
  .arrow { fill: none; stroke: #8b95a1; stroke-width: 1.6 } .head { fill: #8b95a1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e7ebf0 } .paper { fill: #11151a; stroke: #2c3540 } .soft, .verb { fill: #a0abb8 }
    .w { fill: #a0abb8 } .code { fill: #5aa2f0 } .math { fill: #ee8b4a } .both { fill: #a78bf0 }
    .out { stroke: #46515e }
  }
"""
Bits = npt.NDArray[np.bool_]


def matrix(x: int, y: int, kept: Bits, style: str, shades: npt.NDArray[np.float64] | None = None) -> str:
    """Squares for the weights of a matrix: filled where kept, hollow where dropped."""
    squares = []
    for row, column in np.ndindex(SIDE, SIDE):
        at = x + column * STEP, y + row * STEP
        if kept[row, column]:
            shade = "" if shades is None else f' opacity="{shades[row, column]:.2f}"'
            squares.append(
                f'<rect class="{style}" x="{at[0]}" y="{at[1]}" width="{CELL}" height="{CELL}" rx="2"{shade}/>'
            )
        else:
            inside = f'x="{at[0] + 0.5}" y="{at[1] + 0.5}" width="{CELL - 1}" height="{CELL - 1}"'
            squares.append(f'<rect class="out" {inside} rx="2"/>')
    return "\n".join(squares)


def arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    """A smooth arrow that leaves and arrives sideways."""
    bend = (to_x - x) / 2
    path = f"M{x} {y}C{x + bend:g} {y} {to_x - bend:g} {to_y} {to_x} {to_y}"
    head = f"M{to_x + 7} {to_y}l-9 -4.5v9z"
    return f'<path class="arrow" d="{path}"/><path class="head" d="{head}"/>'


def text(x: float, y: float, said: str, style: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{said}</text>'


def picture() -> str:
    """The whole drawing as SVG."""
    rng = np.random.default_rng(3)
    every = np.ones((SIDE, SIDE), np.bool_)
    shades = 0.25 + 0.7 * rng.random((SIDE, SIDE))
    kept = {}
    for name in ("code", "math"):  # seven weights of 49 dropped in each
        kept[name] = np.ones(SIDE * SIDE, np.bool_)
        kept[name][rng.choice(SIDE * SIDE, 7, replace=False)] = False
        kept[name] = kept[name].reshape(SIDE, SIDE)
    both = combine("intersection", [Mask.from_bools({"w": bits}) for bits in kept.values()]).kept("w")
    base, masks, general, model = COLUMNS
    half, right = SIZE / 2, SIZE + 8
    middle = MIDDLE + SIZE // 2
    parts = [
        matrix(base, MIDDLE, every, "w", shades),
        matrix(masks, UPPER, kept["code"], "code"),
        matrix(masks, LOWER, kept["math"], "math"),
        matrix(general, MIDDLE, both, "both"),
        matrix(model, MIDDLE, both, "w", shades),
        arrow(base + right, middle - 12, masks - 16, UPPER + SIZE // 2),
        arrow(base + right, middle + 12, masks - 16, LOWER + SIZE // 2),
        arrow(masks + right, UPPER + SIZE // 2, general - 16, middle - 12),
        arrow(masks + right, LOWER + SIZE // 2, general - 16, middle + 12),
        arrow(general + right, middle, model - 16, middle),
        text(base + half, MIDDLE - 30, "base model", "name"),
        text(base + half, MIDDLE - 13, "fine-tuned, frozen", "soft"),
        text(masks + half, UPPER + SIZE + 17, "code.mask", "name"),
        text(masks + half, LOWER + SIZE + 17, "math.mask", "name"),
        text(general + half, MIDDLE - 30, "general.mask", "name"),
        text(general + half, MIDDLE - 13, "one bit a weight", "soft"),
        text(model + half, MIDDLE - 30, "one model", "name"),
        text(model + half, MIDDLE - 13, "base × mask", "soft"),
        text(base + SIZE + 60, middle + 5, "train", "verb"),
        text(masks + SIZE + 62, middle + 5, "combine", "verb"),
        text(general + SIZE + 60, middle - 10, "apply", "verb"),
        text(base + half, MIDDLE + SIZE + 22, "no weight changes", "soft"),
        text(general + half, MIDDLE + SIZE + 22, "here: kept by both", "soft"),
        text(model + half, MIDDLE + SIZE + 22, "an ordinary checkpoint", "soft"),
    ]
    said = (
        "A fine-tuned base model, two masks trained over it on code and on math, the mask that they combine to, "
        "and the model that this mask makes of the base."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="said">\n<title id="said">{said}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
