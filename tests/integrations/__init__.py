"""The 3D package."""
