"""A trained model in the formats that devices and other tools read."""

from secateur.export.export import read as read
