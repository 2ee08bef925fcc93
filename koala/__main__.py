"""`python -m koala` is `koala`."""

import sys

from koala.cli import main

if __name__ == "__main__":
    sys.exit(main())
