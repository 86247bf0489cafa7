"""`python -m hf_lngd`: see `integrations.command`."""

import sys

from . import __version__

if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print(f"hf_lngd {__version__}")
    else:
        from .integrations.command import main

        main(sys.argv[1:])
