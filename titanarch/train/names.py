"""Names of modules and parameters without what wraps them, and the layers that they belong to."""

WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"})


def plain_name(name: str) -> str:
    """``name`` without what wraps modules."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def layer_of(parameter: str) -> str:
    """The layer of a parameter: up to the first number in its name (``layers.3``), else its module."""
    parts = plain_name(parameter).split(".")
    numbered = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[:-1] if numbered is None else parts[: numbered + 1]) or parts[0]
