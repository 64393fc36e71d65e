"""``python -m pathline.data.prepare``."""

from __future__ import annotations

import sys

from pathline.data.prepare.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
