"""Reads a cache as somebody would who has only its files and `docs/design/`: no logitcache, only NumPy and a Zarr reader.

python tests/independent_reader.py CACHE zarr|tensorstore OUT.npz

Without arguments, each line on standard input has them as a list in JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np


def read_with_zarr(path: Path) -> dict[str, np.ndarray]:
    import zarr

    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(array[...]) for name, array in group.arrays()}


def read_with_tensorstore(path: Path) -> dict[str, np.ndarray]:
    import tensorstore

    found = {}
    for metadata in path.glob("*/zarr.json"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(metadata.parent)}}
        found[metadata.parent.name] = tensorstore.open(spec, read=True).result().read().result()
    return found


def decode(arrays: dict[str, np.ndarray], encoding: dict[str, Any], num_classes: int) -> np.ndarray:
    """Logits (V, R, C), right up to a constant per row; or other values (V, R, D)."""
    if encoding["name"] == "dense":
        logits = arrays["logits"].astype(np.float32)
        if encoding["dtype"] == "uint8":
            step = arrays["step"][..., None]
            logits = np.where((step < 0) & (arrays["logits"] == 0), -np.inf, logits * np.abs(step))
        return logits
    if encoding["name"] == "topk":
        values = arrays["values"].astype(np.float32)
        if encoding["dtype"] == "uint8":
            values = np.where(arrays["values"] == 255, -np.inf, 1 - np.exp(values * math.log(65) / 254))
        each = arrays["tail"].astype(np.float32) - math.log(num_classes - encoding["k"])
        logits = np.repeat(each[..., None], num_classes, axis=-1)
        np.put_along_axis(logits, arrays["ids"].astype(np.int64), values, axis=-1)
        return logits
    if encoding["name"] == "nologits":
        return np.zeros((*arrays["written"].shape, num_classes), dtype=np.float32)
    if encoding["name"] == "values":
        values = arrays["values"].astype(np.float32)
        if encoding["dtype"] == "float16":
            return np.ldexp(values, arrays["exponent"].astype(np.int32)[..., None])
        if encoding["dtype"] == "uint8":
            return values * arrays["step"][..., None] + arrays["lowest"][..., None]
        return values
    if encoding["name"] == "components":
        steps = unpack(arrays["coefficients"], arrays["limits"].tolist()) @ arrays["basis"].astype(np.float32)
        return arrays["mean"] + np.ldexp(arrays["step"] * steps, arrays["exponent"].astype(np.int32)[..., None])
    if encoding["name"] == "packedtopk":
        numbers, used = sets(arrays, num_classes)
        prior = arrays["prior"].astype(np.float32) if encoding["prior"] else np.zeros(num_classes, dtype=np.float32)
        order = arrays["order"] if encoding["prior"] else np.arange(num_classes)
        logits = np.broadcast_to(prior, (*numbers.shape[:2], num_classes)).copy()
        logits[np.nonzero(used)[:2] + (numbers[used],)] = -np.inf
        with np.errstate(divide="ignore"):
            logits += (arrays["tail"].astype(np.float32) - np.log(np.exp(logits).sum(axis=-1)))[..., None]
        logits[np.nonzero(used)[:2] + (numbers[used],)] = arrays["values"][used] * encoding["step"]
        by_class = np.empty_like(logits)
        by_class[..., order] = logits
        by_class -= by_class.max(axis=-1, keepdims=True)
        return by_class - np.log(np.exp(by_class).sum(axis=-1, keepdims=True))
    if encoding["name"] == "sampled" and encoding.get("packed"):
        numbers, used = sets(arrays, num_classes)
        draws = np.zeros((*numbers.shape[:2], num_classes))
        draws[np.nonzero(used)[:2] + (numbers[used],)] = arrays["draws"][used]
        with np.errstate(divide="ignore"):
            return np.log(draws / encoding["draws"])
    if encoding["name"] == "sampled":
        counts = (arrays["ids"][..., None] == np.arange(num_classes)).sum(axis=-2)
        with np.errstate(divide="ignore"):
            return np.log(counts / encoding["draws"])
    if encoding["name"] == "trellislowrank":
        return arrays["mean"] + trellis_values(arrays) @ arrays["basis"].astype(np.float32)
    q = unpack(arrays["coefficients"], arrays["limits"].tolist())
    logits = arrays["mean"] + q @ arrays["basis"].astype(np.float32)
    if encoding["name"] == "toplowrank":
        places = arrays["lowids"].astype(np.int64) + 256 * arrays["highids"].astype(np.int64)
        ids = arrays["classes"].astype(np.int64)[np.minimum(places, num_classes - 1)]
        step = max(18 * math.sqrt(encoding["bit_price"]), 40 / 255)
        values = arrays["base"][..., None] / 4 - step * (
            np.cumsum(arrays["drops"], axis=-1, dtype=np.float32) + np.arange(encoding["k"]) / 64
        )
        np.put_along_axis(logits, ids, values.astype(np.float32), axis=-1)
        return logits
    if encoding["k"]:
        corrected = np.take_along_axis(logits, arrays["ids"].astype(np.int64), axis=-1) + arrays["corrections"] / 4
        np.put_along_axis(logits, arrays["ids"].astype(np.int64), corrected, axis=-1)
    return logits


def sets(arrays: dict[str, np.ndarray], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of classes (..., K), and which places are used."""
    gaps = arrays["low"].astype(np.int64) + 256 * arrays["high"].astype(np.int64)
    numbers = np.cumsum(gaps + 1, axis=-1) - 1
    used = np.arange(numbers.shape[-1]) < arrays["count"][..., None]
    return np.where(used, numbers, 0), used


def unpack(packed: np.ndarray, limits: list[int]) -> np.ndarray:
    """Coefficients (..., R) of `LowRank`, `TopLowRank` and `Components`: the digits of mixed-radix bytes."""
    packed = packed.astype(np.int64)
    columns, byte, product = [], -1, 256
    for limit in limits:
        base = 2 * limit + 1
        if base > 256:
            columns.append(packed[..., byte + 1] + 256 * packed[..., byte + 2] - limit)
            byte, product = byte + 2, 256
            continue
        if product * base > 256:
            byte, product = byte + 1, 1
        columns.append(packed[..., byte] // product % base - limit)
        product *= base
    return np.stack(columns, axis=-1).astype(np.float32)


def trellis_values(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Values (..., P) of `TrellisLowRank`, one row after another."""
    scales, thresholds = arrays["scales"].tolist(), arrays["thresholds"].tolist()
    starts = np.cumsum(np.pad(arrays["frequencies"].astype(np.int64), ((0, 0), (1, 0))), axis=1)
    most = arrays["frequencies"].shape[1] // 2
    rows = arrays["coefficients"].reshape(-1, arrays["coefficients"].shape[-1])
    values = np.zeros((len(rows), len(scales)), dtype=np.float32)
    for row, decoded in zip(rows, values, strict=True):
        waiting = iter(row.tolist())
        code, width = 0, 2**40 - 1
        for _ in range(5):
            code = 256 * code + next(waiting, 0)
        state, activity = 0, thresholds[0][4]
        for place, scale in enumerate(scales):
            table = 2 * (scale + sum(activity > each for each in thresholds[place])) + state % 2
            unit = width // 65536
            symbol = int(np.searchsorted(starts[table], min(code // unit, 65535), side="right")) - 1
            code -= unit * int(starts[table, symbol])
            width = unit * int(starts[table, symbol + 1] - starts[table, symbol])
            while width < 2**32:
                code, width = 256 * code + next(waiting, 0), 256 * width
            q = symbol - most
            value = 2 * q + state % 2
            decoded[place] = value
            activity += 8 * abs(value) - activity // 32
            state = (state // 2) ^ (5 * (state % 2)) ^ (2 * (q % 2))
    return values.reshape(*arrays["coefficients"].shape[:-1], len(scales))


def content_digest(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Of format 2, from the values themselves: no receipt is read."""
    layout = manifest["layout"]
    size = layout["rows_per_block"]
    lines = ["logitcache content 2", f"id {digest(canonical(manifest['identity']))}"]
    lines += [f"num_samples {layout['num_samples']}", f"rows_per_block {size}"]
    lines += [f"fixed {name} {value_hash(arrays[name])}" for name in sorted(layout["fixed"])]
    counts = rows_of_blocks(layout, arrays)
    for view in range(layout.get("first_view", 0), layout["num_views"]):
        of_view = []
        for number, count in enumerate(counts):
            rows = slice(number * size, number * size + count)
            of_view += [f"{number} {name} {value_hash(arrays[name][view, rows])}" for name in sorted(layout["arrays"])]
        lines.append(f"view {view} {digest(joined(of_view))}")
    return digest(joined(lines))


def read_receipts(cache: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Receipts by name: from one file, or from the objects of the views that the index names."""
    gathered = (cache / "receipts.json").read_bytes()
    check(digest(gathered) == manifest["receipts"], "receipts.json")
    found: dict[str, Any] = json.loads(gathered)
    if not manifest.get("receipts_by_view", False):
        return found
    layout = manifest["layout"]
    views = [f"v{view:05d}" for view in range(layout.get("first_view", 0), layout["num_views"])]
    receipts = {"fixed": found["fixed"]}
    for view in views:
        entry = found["views"][view]
        data = (cache / "receipts" / view / f"{entry['object']['sha256']}.json").read_bytes()
        check(digest(data) == entry["object"]["sha256"] and len(data) == entry["object"]["bytes"], view)
        of_view = json.loads(data)
        blocks = [of_view[name] for name in sorted(of_view)]
        lines = [
            f"{number} {name} {stored['values_sha256']}"
            for number, block in enumerate(blocks)
            for name, stored in sorted(block["objects"].items())
        ]
        check(digest(joined(lines)) == entry["object"]["values_sha256"], view)
        check(sum(block["rows"] for block in blocks) == entry["rows"], view)
        stored_bytes = sum(stored["bytes"] for block in blocks for stored in block["objects"].values())
        check(stored_bytes == sum(entry["output_bytes"].values()), view)
        measured = [block for block in blocks if block["kl_mean"] is not None]
        check(sum(block["rows"] for block in measured) == entry["measured_rows"], view)
        if measured:
            mean = sum(block["rows"] * block["kl_mean"] for block in measured) / entry["measured_rows"]
            check(math.isclose(mean, entry["kl_mean"]), view)
        largest = [block["kl_max"] for block in blocks if block["kl_max"] is not None]
        check((len(largest), max(largest, default=None)) == (entry["measured_blocks"], entry["kl_max"]), view)
        receipts |= of_view
    return receipts


def check_values(receipts: dict[str, Any], layout: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Compare the value hashes of receipts with the values."""
    size, counts = layout["rows_per_block"], rows_of_blocks(layout, arrays)
    for name, receipt in receipts.items():
        for array, stored in receipt["objects"].items():
            values = arrays[array]
            if name != "fixed":
                view, number = (int(part[1:]) for part in name.split("/"))
                values = values[view, number * size : number * size + counts[number]]
            check(value_hash(values) == stored["values_sha256"], f"{name} {array}")


def check(is_right: bool, what: str) -> None:
    if not is_right:
        raise SystemExit(f"{what} is not what the specification promises")


def rows_of_blocks(layout: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[int]:
    """Rows of each block of a view: of sequences, whole samples as long as they fit."""
    size = layout["rows_per_block"]
    counts = [1] * layout["num_samples"]
    if "sequence_rows" in layout:
        counts = np.diff(arrays["row_offsets"]).tolist()
    blocks = [0]
    for count in counts:
        if blocks[-1] + count > size:
            blocks.append(0)
        blocks[-1] += count
    return blocks


def rows_in_use(layout: dict[str, Any], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Which rows of the arrays hold labels, bool: blocks of sequences end with unused rows."""
    size = layout["rows_per_block"]
    counts = rows_of_blocks(layout, arrays)
    in_use = np.arange(size) < np.array(counts)[:, None]
    return in_use.reshape(-1)[: arrays[next(iter(layout["arrays"]))].shape[1]]


def joined(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def value_hash(values: np.ndarray) -> str:
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return digest(canonical([values.dtype.str, list(values.shape)]) + values.tobytes())


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_cache(cache: Path, reader: str, out: str) -> None:
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    identity = manifest["identity"]
    read = {"zarr": read_with_zarr, "tensorstore": read_with_tensorstore}[reader]
    arrays = read(cache / "labels.zarr")
    rows = np.flatnonzero(rows_in_use(manifest["layout"], arrays))
    of_rows = {
        name: values[:, rows] if name in manifest["layout"]["arrays"] else values for name, values in arrays.items()
    }
    decoded = decode(of_rows, identity["encoding"], identity["outputs"]["logits"][0])
    outputs = {}
    for name, encoding in identity.get("output_encodings", {}).items():
        shape = identity["outputs"][name]
        arrays_of_it = {key.removeprefix(f"{name}_"): values for key, values in of_rows.items() if key.startswith(name)}
        outputs[f"output_{name}"] = decode(arrays_of_it, encoding, math.prod(shape)).reshape(*decoded.shape[:2], *shape)
    receipts = read_receipts(cache, manifest)
    check_values(receipts, manifest["layout"], arrays)
    np.savez(
        out,
        receipts=sorted(receipts),
        decoded=decoded,
        digest=content_digest(manifest, arrays),
        **outputs,
        **{f"array_{name}": values for name, values in arrays.items()},
    )
    print(sorted(name for name in sys.modules if name.partition(".")[0] in ("logitcache", "torch")), flush=True)


def main() -> None:
    for line in [json.dumps(sys.argv[1:])] if sys.argv[1:] else sys.stdin:
        cache, reader, out = json.loads(line)
        read_cache(Path(cache), reader, out)


if __name__ == "__main__":
    main()
