"""Recognise configuration files by their names."""


def is_config(name: str) -> bool:
    """Whether ``name`` has a suffix of configuration files; names of models have none."""
    return name.endswith((".py", ".json", ".yaml", ".yml"))
