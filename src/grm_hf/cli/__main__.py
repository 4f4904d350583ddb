"""`python -m grm_hf.cli`, for `accelerate launch -m grm_hf.cli train ...`."""

import sys

from . import main


sys.exit(main())
