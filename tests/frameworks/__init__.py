"""Training frameworks around the wrapper."""
