"""A run: its folder, its training loop, its record, and what is made of the finished scene."""
