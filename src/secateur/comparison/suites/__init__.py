"""The suites in the box, a TOML file each."""
