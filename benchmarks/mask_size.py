"""Claim: a mask file takes 1 bit a weight and its header; archived at most 0.51 bit at density 0.9.

Random bits, which is what nothing can compress below their entropy: the worst case of a density.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

from mask_common import at_most, plain, quick, random_packed, record

from mftmerge.mask import Mask


def entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def main() -> None:
    size = 1 << 22 if quick() else 1 << 26
    rows = [plain("weights", size, "weights")]
    with tempfile.TemporaryDirectory() as folder:
        for density in (0.5, 0.8, 0.9, 0.98):
            mask = Mask({"w": random_packed(size, 0, density)}, {"w": (size,)})
            path = Path(folder) / "x.mask"
            mask.save(path)
            raw = path.stat().st_size
            start = time.perf_counter()
            mask.save(path, archive=True)
            wrote = time.perf_counter() - start
            archived = path.stat().st_size
            start = time.perf_counter()
            loaded = Mask.load(path)
            same = (loaded.packed("w") == mask.packed("w")).all()
            read = time.perf_counter() - start
            assert same
            case = f"density {density}, entropy {entropy(density):.3f}"
            if density == 0.9:
                rows.append(at_most(f"{case}: raw", raw * 8 / size, 1.001, "bits a weight"))
                rows.append(at_most(f"{case}: archived", archived * 8 / size, 0.51, "bits a weight"))
                rows.append(plain("archive written", size / 8e6 / wrote, "MB of bits a second"))
                rows.append(plain("archive read", size / 8e6 / read, "MB of bits a second"))
            else:
                rows.append(plain(f"{case}: archived", archived * 8 / size, "bits a weight"))
    record(__file__, (__doc__ or "").split("\n")[0], rows)


if __name__ == "__main__":
    main()
