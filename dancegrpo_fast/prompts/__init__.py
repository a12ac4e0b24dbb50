"""Prompt files, their pictures, and which prompts an iteration takes: `formats.py` reads a file, `folders.py` finds
those of a folder, `images.py` opens what an `image` column holds."""

from .loading import load_prompts as load_prompts
from .order import prompts_of_iteration as prompts_of_iteration
from .order import prompts_of_run as prompts_of_run
from .prompt import Prompt as Prompt
from .prompt import check_text as check_text
