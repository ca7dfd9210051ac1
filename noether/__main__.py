"""`python -m noether` is `noether`."""

from noether.cli.main import main

main()
