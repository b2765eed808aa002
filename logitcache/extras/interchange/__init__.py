"""Caches in the formats of other tools, imported and exported. One module for each format, with both directions.

Names are imported on first use, so that `logitcache --help` starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcache.extras.interchange.export import EXPORT_FORMATS as EXPORT_FORMATS
    from logitcache.extras.interchange.export import export_cache as export_cache
    from logitcache.extras.interchange.parts import ExportResult as ExportResult
    from logitcache.extras.interchange.protocol import DenseRows as DenseRows
    from logitcache.extras.interchange.protocol import Importer as Importer
    from logitcache.extras.interchange.protocol import RecordedViews as RecordedViews
    from logitcache.extras.interchange.protocol import SparseRows as SparseRows
    from logitcache.extras.interchange.protocol import ViewParameters as ViewParameters
    from logitcache.extras.interchange.run import IMPORTERS as IMPORTERS
    from logitcache.extras.interchange.run import ImportResult as ImportResult
    from logitcache.extras.interchange.run import import_cache as import_cache

FORMATS = {
    "numpy": "logits in .npy or .npz files, one file or a folder with one file per view",
    "parquet": "a Parquet file with a column of logits, or with columns of classes and logits",
    "tinyvit": "TinyViT's saved teacher logits: the folder that holds logits_top{K}_epoch{E}",
    "distillkit": "DistillKit's folder of data_{n}.parquet and compression_config.yaml",
    "open_instruct": "open-instruct's folder, in the form of DistillKit's",
    "axolotl": "axolotl's data with the column logprobs: a .jsonl or .parquet file",
    "megatron": "Megatron-LM's folder of cp0_dp{D}__{iteration}.tar",
    "fkd": "FKD's folder of soft labels, one .tar for each image",
    "ml_dr": "Apple ml-dr's folder of {index}.pth.tar",
    "data_comp_dr": "DataCompDR's folder of {8 digits}.tar or .jsonl: embeddings of images and texts, as outputs",
    "specforge": "SpecForge's folder of data_{i}.ckpt or .ckpt.gz: hidden states, with --head",
    "speculators": "speculators' folder of hs_{i}.safetensors: hidden states, with head= in Python",
    "maxtext": "MaxText's folder of teacher_top_k_part_{n}_host_{n}.array_record",
}
"""The built-in formats of `import`, and what SOURCE is for each."""
_HOMES = {
    "EXPORT_FORMATS": "export",
    "ExportResult": "parts",
    "export_cache": "export",
    "DenseRows": "protocol",
    "IMPORTERS": "run",
    "ImportResult": "run",
    "Importer": "protocol",
    "RecordedViews": "protocol",
    "SparseRows": "protocol",
    "ViewParameters": "protocol",
    "import_cache": "run",
}
__all__ = ["FORMATS", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
