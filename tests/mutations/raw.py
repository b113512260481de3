"""Mutations of bytes, for files of any kind."""

from pathlib import Path

import numpy as np

from mutations import Mutation

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def of_file(name: str | None = None, first: int = 1 << 62) -> dict[str, Mutation]:
    """Flipped bits, overwritten, lost and added bytes of the file at the path, or of `name` in the folder there.

    Bits and bytes change within the `first` bytes of it: what stands at a file's beginning says what the rest means.
    """

    def changed(path: Path, change, rng: np.random.Generator) -> str:
        file = path / name if name else path
        content, what = change(file.read_bytes(), rng)
        file.write_bytes(content)
        return f"{file.name}: {what}"

    def mutation(change) -> Mutation:
        return lambda path, rng: changed(path, change, rng)

    def flip(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
        bits = np.frombuffer(content, np.uint8).copy()
        at = rng.integers(min(len(bits), first), size=rng.choice([1, 1, 1, 4, 32]))
        for i in at:
            bits[i] ^= np.uint8(1 << rng.integers(8))
        return bits.tobytes(), f"bits flipped at {sorted(at.tolist())}"

    def overwrite(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
        at = int(rng.integers(min(len(content), first)))
        size = int(rng.choice([1, 2, 4, 8]))
        number = _NUMBERS[rng.integers(len(_NUMBERS))] % (1 << 8 * size)
        written = number.to_bytes(size, "little")
        return content[:at] + written + content[at + size :], f"{written.hex()} written at {at}"

    def truncate(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
        size = int(rng.integers(len(content)) if rng.random() < 0.7 else len(content) - 1 - rng.integers(64))
        return content[: max(0, size)], f"cut off after {size} of {len(content)} bytes"

    def extend(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
        more = rng.bytes(int(rng.choice([1, 31, 32, 4096])))
        if rng.random() < 0.5:
            return content + more, f"{len(more)} bytes added"
        at = int(rng.integers(min(len(content), first)))
        return content[:at] + more + content[at:], f"{len(more)} bytes inserted at {at}"

    changes = {"flip": flip, "overwrite": overwrite, "truncate": truncate, "extend": extend}
    prefix = f"{name} " if name else ""
    return {prefix + what: mutation(change) for what, change in changes.items()}
