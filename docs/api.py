"""The page on Python, from the docstrings of the public names: `python docs/generate.py` writes docs/api.md.

Read from the source and not by importing it, so that nothing heavy is needed.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import mftmerge

ROOT = Path(__file__).resolve().parent.parent
INTRODUCTION = """\
# Python

Everything public is an attribute of `mftmerge`; importing it imports neither torch nor transformers, which the
functions that need them do. Wherever a mask is taken, a `Mask` or the path of a `.mask` file will do. Results show
themselves in a notebook as tables and pictures. Errors are `BadInput` (something given is wrong) and `MftmergeError`
(the work failed). Written by `python docs/generate.py` from the docstrings.
"""
GROUPS = {
    "Masks": ("Mask", "MaskInfo", "Parent", "inspect", "compare"),
    "Learning": ("train_mask", "TrainSettings", "TrainResult", "mask_optimizer", "learnt_mask", "MaskOptimizer"),
    "Without training": ("diff_mask", "DiffSettings", "import_mask"),
    "Combining": ("combine_masks", "combine_files", "operation", "choose_combination", "Choice"),
    "Using": ("apply_mask", "attach", "push_to_hub"),
    "Measuring": ("evaluate_files", "Measures", "evaluate_grid", "GridResult", "write_report"),
    "Recipes": ("build_recipe", "export_recipe", "merge_method"),
    "Merges that are learnt": ("learn_merge", "LearnSettings", "LearnResult", "rebase_mask"),
    "Many runs": ("run_job", "run_sweep", "SweepPlan"),
    "Errors": ("BadInput", "MftmergeError"),
}
OPERATORS = ("__and__", "__or__", "__xor__", "__invert__", "__getitem__", "__len__", "__iter__", "__eq__")


def page() -> str:
    """docs/api.md; a public name that stands in no group is put at the end."""
    public = mftmerge._public()
    grouped = {name for names in GROUPS.values() for name in names}
    groups = GROUPS | ({"More": rest} if (rest := tuple(n for n in public if n not in grouped)) else {})
    text = [INTRODUCTION]
    for heading, names in groups.items():
        text.append(f"## {heading}\n")
        for name in names:
            module, attribute = public[name]
            text.append(described(name, found(module, attribute)))
    return "\n".join(text)


def found(module: str, attribute: str) -> ast.FunctionDef | ast.ClassDef:
    """The definition of a name in a module's source."""
    path = ROOT / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == attribute:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and attribute in {a.asname or a.name for a in node.names}:
            return found(node.module, attribute)
    raise SystemExit(f"{module}: no {attribute}")


def described(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """A heading, the signature and the docstring; of a class, its public methods after it."""
    text = [f"### `{name}`\n"]
    if isinstance(node, ast.FunctionDef):
        return "\n".join([*text, f"```python\n{signature(name, node)}\n```\n", docstring(node), ""])
    text += [docstring(node), ""]
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and (not method.name.startswith("_") or method.name in OPERATORS):
            first = docstring(method).split("\n\n")[0].replace("\n", " ")
            kind = {ast.unparse(d) for d in method.decorator_list}
            call = method.name if "property" in kind else shown(method)
            text.append(f"- `{call}`: {first}" if first else f"- `{call}`")
    return "\n".join([*text, ""])


def shown(method: ast.FunctionDef) -> str:
    """How a method is called: an operator as it is written, else its name and arguments."""
    signs = {"__and__": "a & b", "__or__": "a | b", "__xor__": "a ^ b", "__invert__": "~a", "__eq__": "a == b"}
    signs |= {"__getitem__": "mask[name]", "__len__": "len(mask)", "__iter__": "for name in mask"}
    arguments = [a.arg for a in (*method.args.args, *method.args.kwonlyargs) if a.arg not in ("self", "cls")]
    return signs.get(method.name, f"{method.name}({', '.join(arguments)})")


def signature(name: str, node: ast.FunctionDef) -> str:
    """`name(argument: type = default, ...) -> type`, an argument a line where it is long."""
    arguments, returns = ast.unparse(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({arguments}){returns}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in split(arguments)) + f"){returns}"


def split(arguments: str) -> list[str]:
    """Arguments apart at the commas that stand in no bracket."""
    found, depth = [""], 0
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return [part.strip() for part in found]


def docstring(node: ast.FunctionDef | ast.ClassDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")
