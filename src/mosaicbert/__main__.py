"""`python -m mosaicbert` is the `mosaicbert` command."""

import sys

from mosaicbert.cli import main

if __name__ == "__main__":
    sys.exit(main())
