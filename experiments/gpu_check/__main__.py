"""Runs the command."""

import sys

from experiments.gpu_check import main

sys.exit(main())
