"""``python -m titanarch``."""

import sys

from titanarch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
