"""The live viewer: a run, or a run's folder, in the browser (viser, which is optional)."""
