"""`python -m preftune`: the command line without the installed script."""

import sys

from preftune.cli import main

if __name__ == "__main__":
    sys.exit(main())
