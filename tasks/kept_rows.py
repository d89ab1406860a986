"""What of a shard a stage reads, as digests: the parts that it makes are addressed by them."""

from storage.corpus import Shard
from storage.identity import hash_file


def text_digest(shard: Shard) -> str:
    """Digest of the spans removed from the shard's text; empty where there are none."""
    if shard.keep_path is None or not shard.has_cuts:
        return ""
    return hash_file(shard.keep_path)


def kept_digest(shard: Shard) -> str:
    """Digest of which rows are kept and what was removed from them, not of the reasons."""
    if removed := text_digest(shard):
        return removed
    if (keep := shard.keep) is None or keep.all():
        return ""
    import numpy as np
    import xxhash

    return xxhash.xxh3_128_hexdigest(np.packbits(keep.to_numpy()).tobytes())
