"""`python -m vlmamba`: the `vlmamba` command, for launchers such as torchrun that start modules."""

from .cli import main

main()
