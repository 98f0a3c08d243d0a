"""Scenes that are triangles: a tetrahedral grid whose surface is found anew at each step, and a textured mesh."""
