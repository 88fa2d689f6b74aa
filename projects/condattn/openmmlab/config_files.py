"""Which files are configurations."""


def is_config(name: str) -> bool:
    """Whether ``name`` has a suffix of configuration files, and is not the name of a model."""
    return name.endswith((".py", ".json", ".yaml", ".yml"))
