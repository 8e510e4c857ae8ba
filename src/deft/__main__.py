"""`python -m deft`, as torchrun starts it."""

from deft.cli import main

main()
