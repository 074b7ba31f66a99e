"""`mftmerge serve`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mftmerge.cli.options import options
from mftmerge.cli.reporting import quiet, say
from mftmerge.serve.settings import ServeSettings


@options(given=ServeSettings)
def command(
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint directory or hub id that the masks share.")],
    given: dict[str, Any],
) -> None:
    """Serve a model under several masks, over OpenAI's protocol: a request's `model` names the mask.

    Requests for different masks are answered in one batch. Only this machine reaches the server unless --host says
    otherwise; then give it a key in MFTMERGE_API_KEY.

    \b
    mftmerge serve --model ./base --mask code=code.mask --mask math=math.mask
    """
    from mftmerge.serve.run import serve
    from mftmerge.serve.service import Service

    quiet()

    def announce(line: str) -> None:
        say(line)
        sys.stdout.flush()  # whoever started the server in a script waits for this line

    serve(Service(model, ServeSettings.make(given)), announce)
