"""The wire: messages as bytes, and back. It knows no method."""
