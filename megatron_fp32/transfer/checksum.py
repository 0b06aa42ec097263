import numpy as np, torch


def _cs(p):
    w = p.numpy().view(np.uint64)
    i = np.arange(len(w), dtype=np.uint64)
    with np.errstate(over="ignore"):
        h = (w ^ (i * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(29)
        h *= np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(32)
        return int(h.sum(dtype=np.uint64))


def write_checksum(payload, out):
    out.view(torch.int64).copy_(torch.from_numpy(np.array([_cs(payload)], dtype=np.uint64).view(np.int64)))


def checksums_equal(payload, stored):
    return (
        stored.view(torch.int64) == torch.from_numpy(np.array([_cs(payload)], dtype=np.uint64).view(np.int64))
    ).all()
