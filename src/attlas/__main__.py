"""`python -m attlas` is `attlas`."""

import sys

from attlas.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
