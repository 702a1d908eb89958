"""Data: the formats that can be loaded, how rows are split between clients, and the arrays that workers share."""

from secateur.data.sources import DataInfo, Source, load, names

__all__ = ["DataInfo", "Source", "load", "names"]
