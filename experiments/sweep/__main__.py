import sys

from experiments.cli import allocator
from experiments.sweep import main

allocator.keep_freed_memory()
sys.exit(main())
