"""The wire: Message <-> bytes. Knows no method."""
