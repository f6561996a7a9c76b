"""Applies what components declare: meshes, collectives, FSDP2, tensor and context parallelism."""
