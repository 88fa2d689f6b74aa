"""The data that condattn can make by itself."""
