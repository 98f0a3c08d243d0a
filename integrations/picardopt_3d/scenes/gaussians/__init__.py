"""3D Gaussians: a scene whose number of parameters changes."""
