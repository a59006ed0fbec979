"""The peak memory of a worker is its own."""

import subprocess
import sys

from benchmarks.gate import largest_resident_bytes, resident_bytes

CODE = "from benchmarks.gate import largest_resident_bytes as peak; x = bytearray(64 << 20); print(peak())"


def test_the_peak_of_a_worker_is_not_that_of_the_process_that_started_it():
    held = bytearray(1 << 30)
    held[::4096] = b"x" * len(held[::4096])  # touch every page
    assert largest_resident_bytes() >= resident_bytes() > 1 << 30
    peak = int(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
    assert 64 << 20 < peak < 900 << 20
