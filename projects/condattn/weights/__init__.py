"""Read weight files, load them into a conditioned model, convert their names, resize and calibrate weights."""
