"""What a pipeline's cache is to hold of its teacher beside the logits: modules by name, and how they are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from logitcache.cache.manifest import LOGITS
from logitcache.cache.outputs import Output, check_output_names, checked_outputs, refuse_fitted
from logitcache.catalog.capture import Tap, tap_from_config
from logitcache.encodings import Values, encoding_from_config
from logitcache.errors import UsageError


def outputs_config(value: Any) -> dict[str, dict[str, Any]]:
    """`cache.outputs` in its normal form: a mapping of a tap's fields, and an encoding, for each name.

    Raises:
        UsageError: a name, a key or a value that can't be; says of which output.
    """
    if not isinstance(value, Mapping):
        raise UsageError(f"expected modules by name, such as {{features: layer3}}, not {value!r}")
    check_output_names(name for name in value if name != LOGITS)
    stated = {}
    for name, given in value.items():
        fields = {"module": given} if isinstance(given, str) else given
        if not isinstance(fields, Mapping):
            raise UsageError(f"{name}: expected a module's path or a mapping such as {{module: layer3}}, not {given!r}")
        tap_fields = {key: field for key, field in fields.items() if key != "encoding"}
        if name == LOGITS and tap_fields.keys() != fields.keys():
            raise UsageError("logits: their encoding is `cache.encoding`")
        try:
            stated[name] = tap_from_config(tap_fields).config()
            if name != LOGITS:
                encoding = encoding_from_config(fields.get("encoding", Values()))
                refuse_fitted(encoding)
                stated[name]["encoding"] = encoding.config()
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    return stated


def taps_of(outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tap]:
    """What is taken of the teacher, by name, from the normal form."""
    return {
        name: tap_from_config({key: value for key, value in fields.items() if key != "encoding"})
        for name, fields in outputs.items()
    }


def sources_of(outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where outputs come from, as a cache's identity has it."""
    return {name: tap.config() for name, tap in taps_of(outputs).items()}


def declared_outputs(
    outputs: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Output]:
    """The outputs of a cache to be made, from the normal form and the shapes that were found.

    Raises:
        UsageError: an encoding that can't hold such a shape; names the output.
    """
    sources = sources_of(outputs)
    return checked_outputs(
        {
            name: {"shape": shapes[name], "encoding": fields["encoding"], "source": sources[name]}
            for name, fields in outputs.items()
            if name != LOGITS
        }
    )
