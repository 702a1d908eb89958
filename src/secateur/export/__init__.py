"""A trained model in the formats that devices and other tools read."""
