"""What a backward keeps, computes again or moves to the host."""
