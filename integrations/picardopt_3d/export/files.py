"""The old name of `io`."""

from picardopt_3d.io import replacing, write_json

__all__ = ["replacing", "write_json"]
