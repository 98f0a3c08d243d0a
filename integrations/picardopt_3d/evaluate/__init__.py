"""The quality of finished runs: the paper's measures, and a comparison with the true views where these are known."""
