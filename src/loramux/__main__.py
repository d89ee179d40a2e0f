"""`python -m loramux`."""

import sys

from loramux.cli import main

if __name__ == "__main__":
    sys.exit(main())
