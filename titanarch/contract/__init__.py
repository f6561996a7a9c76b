"""The interfaces that a component keeps, and through which training, parallelism and studies know it."""
