"""`cache.outputs` of a pipeline: which module outputs of the teacher a cache stores, and how they are encoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from logitcache.cache.manifest import LOGITS
from logitcache.cache.outputs import Output, check_output_names, checked_outputs, refuse_fitted
from logitcache.catalog.capture import Tap, tap_from_config
from logitcache.encodings import Values, encoding_from_config
from logitcache.errors import UsageError


def outputs_config(value: Any) -> dict[str, dict[str, Any]]:
    """`cache.outputs` in its normal form: for each name a mapping of a tap's fields and an encoding.

    Raises:
        UsageError: an invalid name, key or value; names the output.
    """
    if not isinstance(value, Mapping):
        raise UsageError(f"expected modules by name, such as {{features: layer3}}, not {value!r}")
    check_output_names(name for name in value if name != LOGITS)
    normalised = {}
    for name, given in value.items():
        fields = {"module": given} if isinstance(given, str) else given
        if not isinstance(fields, Mapping):
            raise UsageError(f"{name}: expected a module's path or a mapping such as {{module: layer3}}, not {given!r}")
        tap_fields = {key: field for key, field in fields.items() if key != "encoding"}
        if name == LOGITS and tap_fields.keys() != fields.keys():
            raise UsageError("logits: set their encoding as `cache.encoding`")
        try:
            normalised[name] = tap_from_config(tap_fields).config()
            if name != LOGITS:
                encoding = encoding_from_config(fields.get("encoding", Values()))
                refuse_fitted(encoding)
                normalised[name]["encoding"] = encoding.config()
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    return normalised


def taps_of(outputs: Mapping[str, Mapping[str, Any]], names: Collection[str] | None = None) -> dict[str, Tap]:
    """The tap of each output, or of each of `names` that is configured, from the normal form."""
    return {
        name: tap_from_config({key: value for key, value in fields.items() if key != "encoding"})
        for name, fields in outputs.items()
        if names is None or name in names
    }


def sources_of(outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tap of each output, as a cache's identity records it."""
    return {name: tap.config() for name, tap in taps_of(outputs).items()}


def declared_outputs(
    outputs: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Output]:
    """The outputs of a new cache, from the normal form and their shapes.

    Raises:
        UsageError: an encoding does not support the shape; names the output.
    """
    sources = sources_of(outputs)
    return checked_outputs(
        {
            name: {"shape": shapes[name], "encoding": fields["encoding"], "source": sources[name]}
            for name, fields in outputs.items()
            if name != LOGITS
        }
    )
