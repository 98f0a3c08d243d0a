"""The tests of both distributions."""
