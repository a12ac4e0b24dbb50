"""What an iteration needs, phase by phase, and what would fit."""
