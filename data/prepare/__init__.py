"""Preparing data: images once to packed shards, which training reads as data ``prepared``.

``command`` prepares; it needs encoders, and is imported by itself, so that reading needs none.
"""

from pathline.data.prepare.manifest import Manifest, read_manifest
from pathline.data.prepare.request import Options

__all__ = ["Manifest", "Options", "read_manifest"]
