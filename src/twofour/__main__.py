"""`python -m twofour`."""

from twofour.cli import main

main()
