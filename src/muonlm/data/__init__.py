"""Data: the batch of step n is a pure function of (seed, step). Knows no model."""
