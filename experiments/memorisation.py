"""The command that looks for memorised secrets: `python -m experiments.memorisation` (`attacks.memorisation`)."""

import sys

from experiments.attacks.memorisation import main
from experiments.cli import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()
    sys.exit(main())
