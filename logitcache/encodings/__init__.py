"""How a (B, C) batch of logits, or of other values, becomes named arrays and back: one file per encoding.

To add a built-in encoding, subclass `Encoding` in a file of its own, add it to `ENCODINGS` below, and run the contract
suite over it in `tests/contract/test_encodings.py`. To add one in a package of your own, see `Encoding`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from logitcache.arrays import ArraySpec as ArraySpec
from logitcache.encodings.auto import Auto as Auto
from logitcache.encodings.components import Components as Components
from logitcache.encodings.dense import Dense as Dense
from logitcache.encodings.lowrank import LowRank as LowRank
from logitcache.encodings.nologits import NoLogits as NoLogits
from logitcache.encodings.packedtopk import PackedTopK as PackedTopK
from logitcache.encodings.protocol import Encoding as Encoding
from logitcache.encodings.sampled import Sampled as Sampled
from logitcache.encodings.topk import TopK as TopK
from logitcache.encodings.toplowrank import TopLowRank as TopLowRank
from logitcache.encodings.trellislowrank import TrellisLowRank as TrellisLowRank
from logitcache.encodings.values import Values as Values
from logitcache.errors import UsageError
from logitcache.registry import Registry, configured

ENCODINGS: Registry[type[Encoding]] = Registry(
    "encoding",
    {
        kind.name: kind
        for kind in (
            Dense,
            TopK,
            PackedTopK,
            LowRank,
            TopLowRank,
            TrellisLowRank,
            Sampled,
            Values,
            Components,
            NoLogits,
        )
    },
    base=Encoding,
)


def encoding_from_config(config: Encoding | str | Mapping[str, Any]) -> Encoding:
    """An encoding from its JSON object (`{"name": "topk", "k": 10}`), its name, or its call (`TopK(k=10)`).

    Raises:
        UsageError: an unknown encoding or parameter, or a parameter out of range.
    """
    encoding = encoding_or_auto(config)
    if isinstance(encoding, Auto):
        raise UsageError("'auto' is an encoding that is still to be chosen; expected the chosen encoding")
    return encoding


def encoding_or_auto(config: Encoding | Auto | str | Mapping[str, Any]) -> Encoding | Auto:
    """As `encoding_from_config`, and `Auto` from `auto` or `{"name": "auto", "max_kl": 0.01}`.

    Raises:
        UsageError: as `encoding_from_config`.
    """
    if isinstance(config, Encoding | Auto):
        return config
    fields = _parse_call(config) if isinstance(config, str) else dict(config)
    name = str(fields.pop("name", "")).lower()
    if name == Auto.name:
        return configured("encoding 'auto'", Auto, fields)
    if name not in ENCODINGS:
        raise UsageError(ENCODINGS.unknown(name, also=[Auto.name]))
    return configured(f"encoding {name!r}", ENCODINGS[name], fields)


def _parse_call(text: str) -> dict[str, Any]:
    """`TopK(k=10)` or `topk` as a mapping; only literals as values, so nothing is executed."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return {"name": node.id}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return {"name": node.func.id} | {str(kw.arg): ast.literal_eval(kw.value) for kw in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f"can't read the encoding {text!r}; expected a name with keyword arguments, such as `TopK(k=10)`")
