"""Studies of the effect of conditioning on accuracy, over several seeds, by rules fixed before the first run."""
