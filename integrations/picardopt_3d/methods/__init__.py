"""Methods: one readable recipe a module, each a frozen config and a loss of (parameters, step)."""
