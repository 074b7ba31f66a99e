"""`mftmerge mergekit-yaml`."""

from __future__ import annotations

from pathlib import Path

import typer

# All options are mergekit's, --help too.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def command(context: typer.Context) -> None:
    """Run mergekit's own mergekit-yaml with our merge methods registered: masked, consensus, localize_and_stitch, emr,
    and those of plug-ins.

    All arguments and options are mergekit's; a mask is a parameter there (mask: file.mask) of the method masked.

    \b
    Example:
      mftmerge mergekit-yaml config.yml OUT --quiet
    """
    import click
    from mergekit.scripts.run_yaml import main
    from pydantic import ValidationError

    from mftmerge import plugins
    from mftmerge.errors import BadInput, MftmergeError
    from mftmerge.recipe.methods import register
    from mftmerge.yamltext import read_document

    plugins.load()
    register()
    try:
        with main.make_context("mftmerge mergekit-yaml", list(context.args)) as inner:
            read_document(Path(inner.params["config_file"]))  # mergekit itself has no limits on aliases
            main.invoke(inner)
    except click.exceptions.Exit as e:
        raise typer.Exit(e.exit_code) from None
    except click.ClickException as e:
        raise BadInput(f"{' '.join(e.format_message().split())} (see 'mftmerge mergekit-yaml --help')") from None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{inner.params['config_file']}: {where or 'the document'}: {first['msg']}") from None
    except MftmergeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise MftmergeError(f"mergekit: {type(e).__name__}: {reason[:300]}; --debug shows where") from e
