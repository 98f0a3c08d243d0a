"""How good finished runs are, as the paper measures it, and against the true views where they are known."""
