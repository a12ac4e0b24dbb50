"""`python -m dancegrpo_fast.cli` is `dancegrpo-fast`, for launchers that want a module."""

import sys

from . import main

sys.exit(main())
