"""Memory of this machine: its size, and the size of its pages. No torch here."""

import os
from pathlib import Path


def read_machine_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's memory or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return total


def use_large_pages() -> None:
    """Have torch ask the kernel for large pages for CPU tensors from 2 MiB on (Linux); an existing choice is kept.

    Activations and logits are allocated and freed at every step. In pages of 4 KiB their first use takes a fifth of a
    training step's time on a CPU, and more memory stays with the allocator. torch reads the variable at its first
    allocation.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
