"""How far a plan may lie from other figures of the same thing."""

# A model composed of few blocks against all of it.
COMPOSED = 0.005
# Figures that another counter found, published with two or three digits.
PUBLISHED = 0.02
