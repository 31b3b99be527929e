"""`python -m calibatt`, the same as `calibatt`."""

import sys
from pathlib import Path

# -m puts the working directory first on sys.path: in a checkout our folder kernels/ would hide Hugging Face's package
sys.path[:] = [entry for entry in sys.path if entry != "" and Path(entry).resolve() != Path.cwd()]

if __name__ == "__main__":
    from calibatt.cli import main

    sys.exit(main())
