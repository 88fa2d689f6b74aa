"""The layers that conditioning puts in the place of others; they take numbers, and know no method."""
