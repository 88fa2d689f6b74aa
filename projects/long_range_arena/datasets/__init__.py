"""The data of the five tasks, read from the layouts in which they are published."""
