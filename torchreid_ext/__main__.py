"""``python -m torchreid_ext`` is drsl-train, for torchrun and for computers whose scripts are not on the path."""

import sys

from torchreid_ext.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
