"""`python -m hf_lngd`: see `integrations.command`."""

import sys

from .integrations.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
