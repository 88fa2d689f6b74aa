"""Files of weights: reading, loading into a conditioned model, converting names, resizing, calibrating."""
