"""The `mftmerge` program: finds a command's file by name, and turns errors into one line and an exit code."""

from __future__ import annotations

import difflib
import errno
import gc
import importlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperGroup

from mftmerge import plugins
from mftmerge.cli.reporting import set_verbosity
from mftmerge.errors import MftmergeError, missing_extra, shown, terminal
from mftmerge.machine import set_threads

INTERRUPTED = 130
BAD_PATH = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # the user's, not the disk's
STOPS = (signal.SIGTERM, signal.SIGHUP)
SWITCHES = ("--debug", "-v", "--verbose", "-q", "--quiet")  # of the whole program
LONGEST = 2000  # characters of an error; a hostile value in the middle of it is cut
UsageError: Any = typer.BadParameter.__mro__[2]  # typer's own copy of click.ClickException, reached by a public name

# Command -> (module with a typer function `command`, line in `mftmerge --help`). Order is the order of the help page.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "The whole path on a small real model: train, combine, apply, build, evaluate."),
    "train": ("train", "Learn a mask over a fine-tuned base model, or all open masks of a recipe."),
    "rebase": ("rebase", "Fit a mask to a merged or further-tuned model, with a few rows."),
    "combine": ("combine", "Combine masks: union, intersection, vote, difference, xor, complement, score."),
    "choose": ("choose", "Choose the combination that keeps most of every domain's gain, on validation rows."),
    "inspect": ("inspect", "Show a mask's density by layer and module, its provenance and family tree."),
    "compare": ("compare", "Compare masks pairwise: overlap of what they prune against two baselines."),
    "apply": ("apply", "Apply a mask to a checkpoint, to its weights or to its delta from a base."),
    "build": ("build", "Build a model from a recipe: a mergekit YAML plus masks."),
    "export": ("export", "Export a recipe to a form that stock mergekit runs."),
    "eval": ("eval", "Evaluate models and masks on held-out rows of several domains."),
    "import": ("import_", "Import masks from other tools' files."),
    "diff-mask": ("diff_mask", "Derive a mask in closed form from a base and a fine-tuned checkpoint."),
    "import-recipe": ("import_recipe", "Read any mergekit YAML as a recipe."),
    "mergekit-yaml": ("mergekit_yaml", "Run mergekit's own command with mftmerge's merge methods registered."),
    "sweep": ("sweep", "Run settings x seeds, choose on validation rows, report on test rows."),
    "patch": ("patch", "Write what changes between a model under two masks, or between two checkpoints."),
    "patch-apply": ("patch_apply", "Apply such a patch to a checkpoint, bit for bit, or undo it."),
    "serve": ("serve", "Serve a model under several masks at once, over OpenAI's protocol."),
    "init": ("init", "Write a file that says a whole job: train, choose, evaluate, report."),
    "run": ("run", "Do a whole job from such a file; goes on where it stopped."),
    "chat": ("chat", "Talk to a model and its masks: their answers beside each other."),
    "push": ("push", "Upload a mask or a checkpoint to the Hugging Face Hub, with a card."),
    "report": ("report", "One self-contained HTML page for a set of masks and results."),
}


class LazyGroup(TyperGroup):
    """A group that imports a command's file only when that command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name, (module, _) in COMMANDS.items() if find_spec(f"mftmerge.cli.{module}")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"mftmerge.cli.{COMMANDS[cmd_name][0]}")
        one = typer.Typer(add_completion=False, rich_markup_mode=None)
        one.command(cmd_name, short_help=COMMANDS[cmd_name][1], context_settings=getattr(module, "CONTEXT", HELP))(
            module.command
        )
        return typer.main.get_command(one)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, from the table alone: the help page imports no command."""
        rows = [(name, COMMANDS[name][1]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows or [("-", "none installed")])


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=HELP)


@app.callback(
    help="Learn, combine, apply and export weight masks for fine-tuned and merged language models.",
    invoke_without_command=True,
)
def root(
    ctx: typer.Context,
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Also show what the libraries log."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress, notes and hints."),
    plugin: list[str] = typer.Option(
        [],
        "--plugin",
        metavar="FILE.py",
        help="Use operations and merge methods of this file or module; may be repeated.",
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    if version:
        from mftmerge import __version__

        print(f"mftmerge {__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(argv: list[str] | None = None) -> None:
    """Run the program; errors become one line on stderr and exit code 2 (bad input) or 1 (failure)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    arguments, asked = _for_all(arguments)
    set_threads()
    gc.set_threshold(10_000)  # importing torch and transformers makes a million objects, and none is garbage
    set_verbosity(("-v" in asked or "--verbose" in asked) - ("-q" in asked or "--quiet" in asked))
    with _stoppable(), terminal():
        _run(arguments, [a for a in asked if a not in SWITCHES], "--debug" in asked)


def _for_all(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments without the options of all commands, which may stand before or after a command's name, and these.

    Of `--plugin FILE` only FILE is among them. All that follows `mergekit-yaml` is mergekit's.
    """
    rest: list[str] = []
    asked: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in SWITCHES and rest[:1] != ["mergekit-yaml"]:
            asked.append(word)
        elif word.startswith("--plugin=") and rest[:1] != ["mergekit-yaml"]:
            asked.append(word.partition("=")[2])
        elif word == "--plugin" and (file := next(words, None)) is not None:
            asked.append(file)
        else:
            rest.append(word)
    return rest, asked


def _run(arguments: list[str], plugged: list[str], debug: bool) -> None:
    try:
        for file in plugged:
            plugins.load_file(file)
        code = app(args=arguments, prog_name="mftmerge", standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
            _fail("interrupted", code, debug)
        sys.exit(code)
    except UsageError as e:
        _fail(_usage(e), 2, debug)
    except MftmergeError as e:
        _fail(str(e), e.exit_code, debug)
    except ModuleNotFoundError as e:
        needed = missing_extra(e)
        _fail(needed or _unexpected(e), 2 if needed else 1, debug)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as e:
        what = f"{e.filename}: {e.strerror}" if e.filename and e.strerror else str(e)
        _fail(what, 2 if e.errno in BAD_PATH else 1, debug)
    except Exception as e:
        _fail(_unexpected(e), 1, debug)


def _usage(error: Any) -> str:
    """An error in the arguments: what is wrong, what may have been meant, where to read on."""
    message, context = " ".join(error.format_message().split()), getattr(error, "ctx", None)
    message = message.replace("Value error, ", "")  # as typer puts what is not among a Literal's values
    wrong, known = getattr(error, "option_name", None), []
    if wrong and context:
        message = f"No such option: {wrong}"
        known = [name for p in context.command.params for name in (*p.opts, *p.secondary_opts)]
    elif match := re.match("No such command '(.*?)'", message):
        message, wrong, known = match[0], match[1], list(COMMANDS)
    near = difflib.get_close_matches(str(wrong), known, 1) if wrong else []
    meant = f"; did you mean {near[0]}?" if near else ""
    where = f" (see '{context.command_path} --help')" if context else ""
    return f"{message}{meant}{where}"


# What libraries raise for the user's own things, by name or by the library's: what to say before their message.
KNOWN = {
    "OutOfMemoryError": "not enough memory on the device (a smaller --batch-size or --batch-tokens needs less)",
    "MemoryError": "not enough memory",
    "RecursionError": "something in a file is nested too deeply",
    "UnicodeDecodeError": "a file is no UTF-8 text",
    "UnicodeEncodeError": "a text cannot be written as UTF-8",
    "StrictDataclassError": "a model's configuration is not valid",
    "DistributedError": "the processes of this run lost each other",
    "huggingface_hub": "the Hub did not give it",
    "httpx": "the network did not give it",
    "requests": "the network did not give it",
    "urllib3": "the network did not give it",
    "safetensors": "a safetensors file cannot be read",
    "safetensors_rust": "a safetensors file cannot be read",
    "pyarrow": "a table of rows cannot be read",
    "datasets": "the rows cannot be read",
    "jinja2": "the chat template of the tokenizer fails",
    "tokenizers": "the tokenizer cannot be read",
    "zipfile": "an archive cannot be read",
    "gzip": "a compressed file cannot be read",
    "zlib": "a compressed file cannot be read",
    "lzma": "a compressed file cannot be read",
    "json": "a file is no JSON",
    "yaml": "a file is no YAML",
}


def _unexpected(error: BaseException) -> str:
    """A line for an error that nobody caught: in the user's terms where its class tells, else as a fault of ours."""
    text = " ".join(str(error).split())
    kinds = type(error).__mro__
    libraries = (k.__module__.partition(".")[0].rstrip("0123456789") for k in kinds)  # httpx2 is httpx
    for name in (*(k.__name__ for k in kinds), *libraries):
        if said := KNOWN.get(name):
            return f"{said}{f': {text}' if text else ''}; --debug shows where"
    return f"unexpected {type(error).__name__}: {text}; run again with --debug and report it"


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let a polite kill (SIGTERM, a closed terminal) end the program as an error does: half-written files go away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in STOPS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, lambda n, _: _fail(f"stopped by {signal.Signals(n).name}", 128 + n, False))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    print(f"mftmerge: error: {shown(message)}", file=sys.stderr)
    sys.exit(code)
