"""Data: what can be loaded, how rows are spread over clients, and the arrays that workers share."""

from secateur.data.sources import DataInfo, Source, load, names

__all__ = ["DataInfo", "Source", "load", "names"]
