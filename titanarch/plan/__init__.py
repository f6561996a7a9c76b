"""What a run will need before it runs: memory, communication and time, from a trace of the real code without its machines."""
