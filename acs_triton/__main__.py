"""`python -m acs_triton`: the command line."""

import sys

from .cli import main

sys.exit(main())
