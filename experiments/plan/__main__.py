import sys

from experiments.plan import main

sys.exit(main())
