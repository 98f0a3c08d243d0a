"""Frameworks around the optimizer: recognized and unwrapped, or refused with the reason."""
