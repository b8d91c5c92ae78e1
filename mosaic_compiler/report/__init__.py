"""Reports: what was planned, what ran, what was measured."""
