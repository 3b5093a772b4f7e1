"""Runs the command: allocation first, since it is decided when a process starts."""

import sys

from experiments.cli import allocator
from experiments.run import main

allocator.keep_freed_memory()
sys.exit(main())
