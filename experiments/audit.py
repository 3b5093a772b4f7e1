"""The audit's command: `python -m experiments.audit` (`attacks.audit`)."""

import sys

from experiments.attacks.audit import main

if __name__ == "__main__":
    sys.exit(main())
