"""A run as dataclasses: recipes are YAML files of these, and every field can be overridden on the command line."""

from .evaluation import EvaluationSettings as EvaluationSettings
from .model import LoraSettings as LoraSettings
from .model import ModelSettings as ModelSettings
from .reading import load_recipe as load_recipe
from .rewards import RewardSettings as RewardSettings
from .sampler import SamplerSettings as SamplerSettings
from .train import TrainSettings as TrainSettings
from .whole import Recipe as Recipe
