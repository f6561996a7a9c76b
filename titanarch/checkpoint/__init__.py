"""Checkpoints: saving, committing, verifying and loading the state of a run."""
