"""What several tests of the 3D package share: scenes in closed form, films, tiny models."""
