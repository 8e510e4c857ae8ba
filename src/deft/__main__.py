"""`python -m deft`, as torchrun starts it."""

from deft.commands.cli import main

main()
