"""Runs the command."""

import sys

from experiments.silo import main

sys.exit(main())
