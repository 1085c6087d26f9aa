"""`python -m muonlm` and `torchrun -m muonlm`."""

import sys

from .cli import main

sys.exit(main())
