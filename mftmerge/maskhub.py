"""A mask on the Hugging Face Hub, `hf://owner/name/file.mask[@revision]`: downloaded once, then read from the cache."""

from __future__ import annotations

import re
from pathlib import Path

from mftmerge.errors import BadInput

SCHEME = "hf:/"  # a Path has made one slash of two
REFERENCE = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)/([^@]+)(?:@([\w./-]+))?")


def located(reference: str | Path) -> Path:
    """The local file of a mask: a path is itself, only what starts with hf:// is looked for on the Hub.

    Raises BadInput for a reference of another form, and for what the Hub does not have or does not give.
    """
    text = str(reference)
    if not text.startswith(SCHEME):
        return Path(reference)
    match = REFERENCE.fullmatch(text)
    text = f"hf://{text.removeprefix(SCHEME).lstrip('/')}"
    if match is None:
        raise BadInput(f"{text}: give hf://owner/name/file.mask, with @revision at the end if need be")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(match[1], match[2], revision=match[3]))
    except Exception as e:  # the hub's client raises many kinds: absent, gated, offline, no such revision
        reason = (str(e).strip().splitlines() or [""])[0]
        raise BadInput(f"{text}: cannot be had from the Hub ({type(e).__name__}: {reason})") from None
