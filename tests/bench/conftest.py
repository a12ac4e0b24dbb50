"""`bench` lies beside the installed package: its folder comes last, so that the installed package is the one tested."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
