"""Studies: what conditioning does to accuracy, over seeds, by rules that were fixed before the first run."""
