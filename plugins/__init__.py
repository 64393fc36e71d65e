"""Plugins shipped with pathline; each is found through the entry-point group ``pathline.plugins``."""
