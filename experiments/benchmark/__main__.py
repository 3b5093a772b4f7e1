import sys

from experiments.benchmark.command import main
from experiments.cli import allocator

allocator.keep_freed_memory()
sys.exit(main())
