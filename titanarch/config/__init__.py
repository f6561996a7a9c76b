"""Configuration: schemas, errors, registries and the TOML loader. Knows nothing of torch or of the root schema."""
