"""Entry point of `python -m rlhf.cli`, which is the same as `rlhf`."""

from rlhf.cli.main import main

main()
