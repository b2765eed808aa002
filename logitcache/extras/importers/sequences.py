"""Identity of sequences of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logitcache.data.samples import DIGEST_BYTES, bytes_digest
from logitcache.data.tokens import content_of_ids


def content_digests(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The digest of each sequence's token ids as `TokenDataset` has it, uint8 (N, 16).

    Raises:
        ValueError: an id that is no token id.
    """
    digests = np.empty((len(sequences), DIGEST_BYTES), dtype=np.uint8)
    for number, ids in enumerate(sequences):
        if len(ids) and (ids.dtype.kind not in "iu" or int(ids.min()) < 0 or int(ids.max()) >= 2**31):
            raise ValueError("token ids that are no numbers from 0 to 2**31 - 1")
        digests[number] = np.frombuffer(bytes_digest(content_of_ids(ids)), np.uint8)
    return digests
