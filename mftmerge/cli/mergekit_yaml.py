"""`mftmerge mergekit-yaml`."""

from __future__ import annotations

import typer

SETTINGS = {"context_settings": {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}}


def command(context: typer.Context) -> None:
    """Run mergekit's own mergekit-yaml with our merge methods registered: masked, consensus, localize_and_stitch, emr,
    and those of plug-ins.

    All arguments and options are mergekit's; a mask is a parameter there (mask: file.mask) of the method masked.

    \b
    Example:
      mftmerge mergekit-yaml config.yml OUT --quiet
    """
    from mergekit.scripts.run_yaml import main

    from mftmerge import plugins
    from mftmerge.recipe.methods import register

    plugins.load()
    register()
    main(args=context.args, prog_name="mftmerge mergekit-yaml", standalone_mode=False)
