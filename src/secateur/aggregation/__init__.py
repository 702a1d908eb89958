"""From what replies became to the next server model."""
