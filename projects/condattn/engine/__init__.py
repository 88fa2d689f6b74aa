"""What surrounds a model in a run: the shared logic of the tools, hooks and built-in data sets."""
