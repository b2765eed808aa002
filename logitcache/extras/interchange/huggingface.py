"""A Hugging Face dataset: Parquet files in `data/` and the card as `README.md`. `import` reads `data/` as `parquet`."""

from __future__ import annotations

from pathlib import Path

from logitcache.cache.card import render_card
from logitcache.cache.manifest import CARD
from logitcache.cache.reader import LogitCache
from logitcache.errors import UsageError
from logitcache.extras.interchange.parquet import write_views
from logitcache.extras.interchange.parts import ExportResult
from logitcache.markdown import table
from logitcache.storage.local import LocalStorage

DATA = "data"
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": f"{DATA}/view-*.parquet"}]}]
"""Where `datasets` finds the rows, for the front matter of the card."""


def export_huggingface(cache: LogitCache, folder: Path, *, views: str | None, top: int | None) -> ExportResult:
    """Write `data/view-00000.parquet` and so on, and `README.md`, which is left as it is if there is one already.

    Raises:
        UsageError: the folder has other files, or another export.
    """
    others = sorted({path.name for path in folder.iterdir()} - {DATA, CARD}) if folder.is_dir() else []
    if others:
        raise UsageError(f"{folder} contains other files ({others[0]!r}); an export needs a folder of its own")
    result = write_views(cache, folder / DATA, views=views, top=top)
    if not (folder / CARD).exists():
        card = render_card(cache, front={"configs": CONFIGS}, loading=_loading(cache, top))
        LocalStorage(folder).put(CARD, card.encode())
    return result


def _loading(cache: LogitCache, top: int | None) -> str:
    """The section about loading, in place of the cache's own."""
    columns = {"`view`": "number of the view", "`row`": "number of the row in a view"}
    if not cache.row_map.one_each:
        columns |= {"`sample`": "number of the sample", "`position`": "position of the row in its sample"}
    if cache.samples is not None and cache.samples.keys is not None:
        columns["`key`"] = "key of the sample"
    if cache.samples is not None:
        columns["`target`"] = "true label of the sample; -1 for none"
    if top is None:
        columns["`logits`"] = f"the {cache.num_classes:,} logits, right up to a constant per row"
    else:
        columns |= {
            "`classes`": f"the {top} largest classes",
            "`logits`": "their logits",
            "`tail`": "log-sum-exp of all other logits",
        }
    return (
        "## Load it\n\n"
        "```python\nimport datasets\n\n"
        'rows = datasets.load_dataset(".", split="train")  # this folder, or OWNER/NAME on the Hub\n```\n\n'
        f"{table(columns)}\n"
        "These are the decoded logits of a logitcache cache, which can also be [used "
        "directly](https://logitcache.readthedocs.io). The sections below describe that cache.\n"
    )
