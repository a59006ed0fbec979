"""Memory of this machine. No torch here."""

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
