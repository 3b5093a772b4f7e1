"""Runs the command."""

import sys

from experiments.budget import main

sys.exit(main())
