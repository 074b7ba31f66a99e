"""`mftmerge chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mftmerge.cli.options import MASKS, AsJson, files, named
from mftmerge.cli.reporting import print_json, quiet, say
from mftmerge.errors import BadInput, shown

if TYPE_CHECKING:
    from rich.table import Table

    from mftmerge.talk import Talk

HELP = "/use NAME... : only these answer; /all; /new: forget what was said; /quit"


def command(
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint directory or hub id, or model+adapter.")],
    masks: Annotated[
        list[str] | None,
        typer.Option("--mask", metavar="[NAME=]FILE", help="A mask; may be repeated.", autocompletion=files(*MASKS)),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Answer this and stop; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")] = 200,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; a GPU when there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model and its masks: one prompt, their answers beside each other, as the words come.

    The model is loaded once, masks are switched in memory. Without a terminal, prompts are the lines of standard input.

    \b
    While chatting:
      /use code math   only these answer          /all   all of them again
      /new             forget what was said       /quit  (or Ctrl-D)
    Example:
      mftmerge chat --model my-model --mask code.mask --mask math.mask
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"--dtype {dtype}: give auto, float32 or bfloat16")
    if as_json and not prompt:
        raise BadInput("--json prints the answers to --prompt; give at least one")
    from mftmerge.mask import Mask

    opened = {name: Mask.load(path) for name, path in named(masks or [], "--mask").items()}  # before the model
    quiet()
    from mftmerge.loading import load_model
    from mftmerge.talk import Talk

    live, tokenizer = load_model(model, dtype=dtype, device=device)
    talk = Talk(live, tokenizer, opened, max_new_tokens=max_new_tokens)
    if as_json:
        print_json([{"prompt": text, "answers": _whole(talk, text)} for text in prompt or ()])
        return
    if prompt:
        for text in prompt:
            _answer(talk, text)
        return
    terminal = sys.stdin.isatty()
    if terminal:
        say(f"{', '.join(talk.names)} answer. {HELP}")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line:
            _handle(talk, line)


def _handle(talk: Talk, line: str) -> None:
    """A prompt, or one of the words with a slash."""
    word, *names = line.split()
    try:
        if word == "/use":
            talk.show(names)
            say(f"now: {', '.join(talk.shown)}")
        elif word == "/all":
            talk.show(())
        elif word == "/new":
            talk.forget()
        elif word.startswith("/"):
            say(HELP)
        else:
            _answer(talk, line)
    except BadInput as e:
        say(str(e))


def _whole(talk: Talk, prompt: str) -> dict[str, str]:
    texts = dict.fromkeys(talk.shown, "")
    for name, piece in talk.answers(prompt):
        texts[name] += piece
    return texts


def _answer(talk: Talk, prompt: str) -> None:
    """Columns that grow, on a terminal; elsewhere one answer after the other."""
    if not sys.stdout.isatty():
        last = None
        for name, piece in talk.answers(prompt):
            if name != last:
                print(("" if last is None else "\n") + f"[{shown(name)}] ", end="")
                last = name
            print(_printable(piece), end="", flush=True)
        print()
        return
    from rich.live import Live

    texts = dict.fromkeys(talk.shown, "")
    with Live(_columns(texts), refresh_per_second=12, vertical_overflow="visible") as view:
        for name, piece in talk.answers(prompt):
            texts[name] += _printable(piece)
            view.update(_columns(texts))


def _columns(texts: dict[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, padding=(0, 1))
    for name in texts:
        table.add_column(Text(shown(name)), ratio=1)
    table.add_row(*(Text(text.strip()) for text in texts.values()))
    return table


def _printable(text: str) -> str:
    """What a model writes, without what would move the cursor or change the terminal."""
    return "".join(c if c in "\n\t" else shown(c) for c in text)
