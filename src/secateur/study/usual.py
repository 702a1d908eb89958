"""What a study is of where it does not say: apart from it, so that a command tells it before torch is imported."""

METHOD = "autoflip"
SOURCE = "digits"
