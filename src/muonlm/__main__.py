"""`python -m muonlm` and `torchrun -m muonlm`."""

import sys

from muonlm.cli.main import main

sys.exit(main())
