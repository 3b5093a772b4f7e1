"""The command that looks for memorised secrets: `python -m experiments.memorisation` (`attacks.memorisation`)."""

import sys

from experiments import allocator
from experiments.attacks.memorisation import main

if __name__ == "__main__":
    allocator.keep_freed_memory()
    sys.exit(main())
