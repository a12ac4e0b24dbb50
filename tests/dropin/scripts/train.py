"""Both trainings one after the other, as their imports cost more than they. Usage: train.py OUTPUT."""

import json
import sys
from pathlib import Path

import flux
import stable_diffusion

if __name__ == "__main__":
    found = {"stable_diffusion": stable_diffusion.train(), "flux": flux.train()}
    Path(sys.argv[1]).write_text(json.dumps(found))
