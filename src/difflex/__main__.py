"""`python -m difflex` is the command `difflex`."""

import sys

from difflex.cli import main

if __name__ == "__main__":
    sys.exit(main())
