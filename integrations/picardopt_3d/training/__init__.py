"""Training of the guidance model that ships with the package."""
