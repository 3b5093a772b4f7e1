import sys

from experiments import allocator
from experiments.benchmark.command import main

allocator.keep_freed_memory()
sys.exit(main())
