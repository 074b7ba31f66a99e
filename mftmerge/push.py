"""To the Hub: a mask with a card that says what it is and how to use it, or a masked checkpoint as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mftmerge import card
from mftmerge.checkpoint import Checkpoint
from mftmerge.errors import BadInput, MftmergeError
from mftmerge.mask import Mask

MASK = "general.mask"  # one name in every repository: whoever downloads a mask need not ask for its file's name
CARD = "README.md"
SCRIPT = """\
```sh
pip install 'mftmerge[train]'
mftmerge apply hf://{repository}/{file} --model {base} -o masked-model
mftmerge chat --model {base} --mask hf://{repository}/{file}
```

```python
import mftmerge
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
switcher = mftmerge.attach(model, {{"mask": hf_hub_download("{repository}", "{file}")}})
with switcher.use("mask"):
    ...  # model.generate; outside of the block the model is what it was, bit for bit
```"""


@dataclass(frozen=True)
class Pushed:
    """What was uploaded: files by their names there, the card's text, and the commit's address (None: a dry run)."""

    repository: str
    files: dict[str, Path | str]
    card: str
    url: str | None


def push(
    what: str | Path,
    repository: str,
    *,
    base: str | None = None,
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Upload a .mask file or a checkpoint's directory to a model repository of the Hub, made if it is not there.

    repository: `owner/name`. base: hub id of the model that a mask belongs to, where the mask does not name one.
    license: the card's, by default that of the base where the mask records a local directory that says it. A
    checkpoint of `mftmerge apply` or `build` has its card already. dry_run: upload nothing.
    Raises BadInput, MftmergeError where the Hub refuses.
    """
    if repository.count("/") != 1:
        raise BadInput(f"{repository}: give the repository as OWNER/NAME")
    path = Path(what)
    if path.is_dir():
        Checkpoint.open(path)
        files: dict[str, Path | str] = {p.name: p for p in sorted(path.iterdir()) if p.is_file()}
        text = card.read_card(path / CARD) or ""
        if not text:
            raise BadInput(f"{path}: no {CARD}, which is its card; checkpoints of apply and build have one")
    else:
        mask = Mask.load(path)
        text = "\n\n".join(mask_card(mask, repository, base, license)) + "\n"
        files = {CARD: text, MASK: path}
    url = None if dry_run else _upload(files, repository, private)
    return Pushed(repository, files, text, url)


def mask_card(mask: Mask, repository: str, base: str | None = None, license: str | None = None) -> Iterator[str]:
    """The card of a mask, in paragraphs: front matter, what it is, how to use it, its family tree."""
    recorded = mask.info.base
    named = base or recorded
    front, _ = card.split_front_matter((recorded and card.read_card(Path(recorded) / CARD)) or "")
    kept: dict[str, str | list[str]] = {k: v for k, v in front.items() if k.startswith("license") or k == "language"}
    kept |= {"license": license} if license else {}
    hub_id = named if named and named.count("/") == 1 and not Path(named).exists() else None
    yield card.front_matter(
        kept | {"library_name": "mftmerge"}, ("mftmerge", "mask-fine-tuning"), [hub_id] if hub_id else None
    )
    model = card.public_name(named) if named else "BASE_MODEL"
    yield f"# A weight mask for `{model}`"
    yield (
        f"One bit a weight for {len(mask)} tensors ({sum(map(mask.size, mask)):,} weights), of which "
        f"{mask.density():.1%} are kept; the others become 0"
        + (" or go back to the model before fine-tuning." if mask.info.on == "delta" else ".")
    )
    yield SCRIPT.format(repository=repository, file=MASK, base=hub_id or model)
    yield "## Where it comes from"
    yield "```\n" + "\n".join(card.mask_tree(mask, mask.digest)) + "\n```"


def _upload(files: dict[str, Path | str], repository: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    operations = [CommitOperationAdd(n, c.encode() if isinstance(c, str) else c) for n, c in files.items()]
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.create_commit(repository, operations, commit_message="Upload with mftmerge").commit_url)
    except (HfHubHTTPError, OSError) as e:
        reason = " ".join(str(e).split())[:300]
        raise MftmergeError(
            f"{repository}: the Hub refused ({reason}); `hf auth login` gives a token that may write"
        ) from e
