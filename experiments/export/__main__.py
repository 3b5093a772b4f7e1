"""Runs the command."""

import sys

from experiments.export import main

sys.exit(main())
